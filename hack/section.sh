#!/usr/bin/env bash
# Puts a measured text into a document: what stands between the lines
# <!-- NAME: ... --> and <!-- NAME end --> becomes the content of TEXT.
# usage: hack/section.sh DOCUMENT NAME TEXT
set -euo pipefail
doc=$1 name=$2 text=$3
[ -s "$text" ] || { echo "$text is empty: $doc stays as it is" >&2; exit 1; }
new=$(mktemp "$doc.XXXXXX")
trap 'rm -f "$new"' EXIT
awk -v name="$name" -v text="$text" '
	index($0, "<!-- " name " end -->") == 1 { if (!in_it) exit 1; in_it = 0; print ""; ended = 1 }
	!in_it { print }
	index($0, "<!-- " name ": ") == 1 {
		if (in_it || ended) exit 1
		in_it = 1; print ""
		while ((getline line < text) > 0) print line
	}
	END { if (in_it || !ended) exit 1 }
' "$doc" >"$new" || { echo "$doc has no section <!-- $name: ... --> to <!-- $name end -->" >&2; exit 1; }
chmod --reference="$doc" "$new"
mv "$new" "$doc"
echo "$doc: section $name is from this run"
