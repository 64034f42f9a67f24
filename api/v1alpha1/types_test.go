package v1alpha1

import (
	"reflect"
	"testing"
)

// A field that is built must not be refused as one that is not.
func TestNotYetIsNotThere(t *testing.T) {
	var walk func(t *testing.T, typ reflect.Type)
	walk = func(t *testing.T, typ reflect.Type) {
		for typ.Kind() == reflect.Slice || typ.Kind() == reflect.Pointer {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || typ.PkgPath() != reflect.TypeFor[Rule]().PkgPath() {
			return
		}
		for i := range typ.NumField() {
			f := typ.Field(i)
			name := f.Tag.Get("json")
			for j, c := range name {
				if c == ',' {
					name = name[:j]
					break
				}
			}
			if _, ok := NotYet(name); ok {
				t.Errorf("%s.%s is a field, and named as one that is not supported yet", typ, f.Name)
			}
			walk(t, f.Type)
		}
	}
	walk(t, reflect.TypeFor[ClusterDetectionPolicy]())
	if NotYetKind(KindClusterDetectionPolicy) {
		t.Errorf("%s is a kind that is built", KindClusterDetectionPolicy)
	}
}
