#!/usr/bin/env bash
# Starts collector and agent on this machine with the starter pack. State is in
# ./.run; alerts go to the terminal and to .run/alerts.ndjson. Ctrl-C stops the
# agent first, so that everything it spooled reaches the collector.
set -euo pipefail
cd "$(dirname "$0")/.."

run=${PROCESSION_RUN:-.run}
listen=${PROCESSION_LISTEN:-127.0.0.1:7443}
policies=${PROCESSION_POLICIES:-deploy/helm/procession/policies}
node=${PROCESSION_NODE:-$(uname -n)}

if [ "$(id -u)" -ne 0 ]; then
	echo "make run: the kernel tells process events to root only: run it as root (sudo make run)" >&2
	exit 1
fi
mkdir -p "$run"
chmod 700 "$run"

collector_pid='' agent_pid=''
stop() {
	trap '' INT TERM
	if [ -n "$agent_pid" ]; then
		kill -TERM "$agent_pid" 2>/dev/null || true
		wait "$agent_pid" 2>/dev/null || true
	fi
	if [ -n "$collector_pid" ]; then
		kill -TERM "$collector_pid" 2>/dev/null || true
		wait "$collector_pid" 2>/dev/null || true
	fi
}
trap stop EXIT
trap 'echo; exit 0' INT TERM

# setsid: a Ctrl-C at the terminal reaches this script alone, which stops the
# two in order.
rm -f "$run/ready"
before=$(stat -c %s "$run/collector.log" 2>/dev/null || echo 0)
setsid bin/collector serve --state "$run/collector" --listen "$listen" --cluster local \
	--ndjson "$run/alerts.ndjson" --terminal --ready-file "$run/ready" 2>>"$run/collector.log" &
collector_pid=$!
until [ -e "$run/ready" ]; do
	if ! kill -0 "$collector_pid" 2>/dev/null; then
		collector_pid=''
		echo "make run: the collector did not start; its log ($run/collector.log) says:" >&2
		tail -c "+$((before + 1))" "$run/collector.log" | tail -n 3 >&2
		exit 1
	fi
	read -rt 0.1 <> <(:) || true
done

bin/collector issue --state "$run/collector" --node "$node" --out "$run/agent-tls" >/dev/null
setsid bin/agent run --state "$run/agent" --policies "$policies" --node "$node" \
	--collector "$listen" --tls "$run/agent-tls" 2> >(trap '' INT; exec tee -a "$run/agent.log" >&2) &
agent_pid=$!

# Either one ending by itself ends the run, with its exit status.
set +e
wait -n "$collector_pid" "$agent_pid"
status=$?
set -e
if ! kill -0 "$agent_pid" 2>/dev/null; then
	agent_pid=''
	echo "make run: the agent ended by itself (exit $status), see above and $run/agent.log" >&2
else
	collector_pid=''
	echo "make run: the collector ended by itself (exit $status), see $run/collector.log" >&2
fi
exit 1
