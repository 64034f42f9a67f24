package celenv

import "fmt"

// Without checks that the expression reads no variable that hidden gives a
// reason for, also not by way of the policy's own variables.
func (x *Expr) Without(hidden func(variable string) (reason string)) error {
	var errs Errors
	for _, u := range x.where {
		for _, slot := range u.slots {
			v := &x.scope.env.vars[slot]
			reason := hidden(v.Name)
			if reason == "" || len(errs) == maxProblems {
				continue
			}
			what := v.Name
			if u.name != v.Name {
				what = u.name + " uses " + v.Name + ", which"
			}
			errs = append(errs, &Error{Line: u.at.Line(), Col: u.at.Column() + 1, Msg: fmt.Sprintf("%s %s", what, reason)})
		}
	}
	if errs != nil {
		return errs
	}
	return nil
}
