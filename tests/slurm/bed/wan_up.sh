#!/bin/bash
# wan_up.sh SITE LINK.json NODE...  - move nodes to a remote site (1 to 9) behind a long line.
# Sites hang in a star on the main bridge; LINK.json is described in wan.py and may be replaced
# (by rename) while the line is up. A node that dies boots at its site again.
. "$(dirname "$0")/namespaces.sh"
site=$1 link=$2
shift 2
if ! init_of "wan$site" >/dev/null; then
  on_switch ip -batch - <<IP || die "cannot make the devices of site $site"
link add site$site type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set site$site up
tuntap add dev w${site}a mode tap vnet_hdr
tuntap add dev w${site}b mode tap vnet_hdr
link set w${site}a master main up
link set w${site}b master site$site up
IP
  log=$BED_DIR/log/wan$site.log
  setsid nsenter -t "$(init_of switch)" -n python3 "$HERE/wan.py" "$link" </dev/null >"$log" 2>&1 &
  line=$!
  await 10 grep -q ready "$log" || die "the line of site $site: see $log"
  record "wan$site" "$line"
fi
for node in "$@"; do
  node=$(name "$node")
  echo "site$site" >"$RUN/$node.bridge"
  on_switch ip link set "v-$node" master "site$site" || die "cannot move $node"
done
