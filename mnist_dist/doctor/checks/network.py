"""Names, interfaces and ports, over which the processes of a job reach each other."""

import ipaddress
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.doctor.finding import Finding
from mnist_dist.doctor.probe import Outcome
from mnist_dist.launch.address import is_address, split_address
from mnist_dist.launch.ports import OWN_PORTS
from mnist_dist.launch.topology import HorovodRun, Step, TFConfig, Topology
from mnist_dist.launch.variables import Variables, printable

_HOSTS_FILE = "correct /etc/hosts: the line of this name should have the address of the network, not 127.0.1.1"


def job_hosts(topology: Topology) -> list[str]:
    """The hosts of all ranks, as far as the launcher tells; each once."""
    launcher = topology.launcher
    hosts: Sequence[str] = ()
    if isinstance(launcher, Step):
        hosts = launcher.hosts
    elif isinstance(launcher, TFConfig):
        hosts = [split_address(address)[0] for address in launcher.addresses]
    return list(dict.fromkeys(hosts))


def check_names(outcome: Outcome, topology: Topology, *, own: str) -> Finding:
    """Whether the names of the job's hosts lead over the network; `own` is the name of this machine."""
    name = "host names"
    told = {key.removeprefix("host "): value for key, value in outcome.answers.items() if key.startswith("host ")}
    hosts = job_hosts(topology)
    if missing := [host for host in (own, *hosts) if host not in told]:
        fix = "look at /etc/resolv.conf and its name servers, or write the hosts into /etc/hosts"
        return Finding(name, "error", f"looking up {missing[0]} {outcome.describe()}", fix)
    several = len(hosts) > 1 or (
        isinstance(topology.launcher, HorovodRun) and topology.local_size < topology.world_size
    )
    # Without a network nothing is wrong with a single machine whose name is unknown.
    if not several:
        return Finding(name, "ok", f"{own} -> {', '.join(told[own]['addresses']) or 'no address'}; a single host")
    for host in hosts:
        if not told[host]["addresses"]:
            return Finding(name, "error", f"{host} has no address here", "add it to the name server, or to /etc/hosts")
        if not _is_literal(host) and all(map(_is_loopback, told[host]["addresses"])) and host != own:
            return Finding(
                name, "error", f"{host}, another host, resolves to {told[host]['addresses'][0]}", _HOSTS_FILE
            )
    if (
        not _is_literal(own)
        and all(map(_is_loopback, told[own]["addresses"]))
        and not (hosts and all(map(_is_literal, hosts)))
    ):
        found = f"{own}, this host, resolves only to {', '.join(told[own]['addresses']) or 'nothing'}"
        if topology.interface is None:
            return Finding(
                name, "warning", f"{found}: others cannot reach it there", f"{_HOSTS_FILE}, or set HOROVOD_GLOO_IFACE"
            )
    return Finding(name, "ok", ", ".join(f"{host} -> {told[host]['addresses'][0]}" for host in hosts[:4] or [own]))


def check_interfaces(outcome: Outcome, topology: Topology, variables: Variables, *, own: str) -> Finding:
    """Whether the interfaces that variables name exist, and over which one the other hosts are reached."""
    name = "interface"
    known: Mapping[str, bool] | None = outcome.answers.get("interfaces")
    if known is None:
        return Finding(name, "unknown", f"listing the interfaces {outcome.describe()}")
    listed = ", ".join(known)
    chosen = topology.interface
    if chosen is not None and chosen not in known:
        found = f"HOROVOD_GLOO_IFACE={printable(chosen, 80)}: no such interface"
        return Finding(name, "error", found, f"set it to one of {listed}, or unset it")
    if chosen is not None and not known[chosen]:
        return Finding(
            name,
            "error",
            f"HOROVOD_GLOO_IFACE={chosen}: this interface is down",
            f"ip link set {chosen} up, or unset it",
        )
    nccl = variables.get("NCCL_SOCKET_IFNAME", "")
    wanted = [one for one in nccl.removeprefix("=").split(",") if one] if not nccl.startswith("^") else []
    if wanted and not any(interface.startswith(one) for one in wanted for interface in known):
        found = f"NCCL_SOCKET_IFNAME={printable(nccl, 80)}: no such interface"
        return Finding(name, "error", found, f"set it to one of {listed}, or unset it")
    if chosen is not None:
        return Finding(name, "ok", f"{chosen} (HOROVOD_GLOO_IFACE)")
    others = [host for host in job_hosts(topology) if host != own]
    ways = {host: (outcome.answers.get(f"host {host}") or {}).get("interface") for host in others}
    if lost := [host for host, way in ways.items() if way is None]:
        where = " in slurm/site.sh" if topology.slurm else ""
        fix = f"check the route (ip route get ADDRESS), or set HOROVOD_GLOO_IFACE{where}"
        return Finding(name, "warning", f"it is not known over which interface {lost[0]} is reached", fix)
    found = ", ".join(dict.fromkeys(str(way) for way in ways.values())) or "not needed: a single host"
    return Finding(name, "ok", f"{found} towards the other hosts" if ways else found)


def check_ports(proc: Path, topology: Topology, *, problem: str | None = None) -> Finding:
    """Whether the ports that ranks listen at are free; `problem` says why this rank could not."""
    name, ours = "ports", f"{OWN_PORTS.start}-{OWN_PORTS.stop - 1}"
    if problem is not None:
        found, _, fix = problem.partition("; ")
        return Finding(name, "error", found, fix or "end the program that has the port, or name another one")
    if topology.world_size == 1:
        return Finding(name, "ok", "not needed: one process")
    try:
        text = (proc / "sys/net/ipv4/ip_local_port_range").read_text()
    except OSError as error:
        return Finding(name, "unknown", f"the range of ports that Linux assigns is not readable ({error.strerror})")
    first, last = (int(number) for number in re.findall(r"\d+", text)[:2])
    if first < OWN_PORTS.stop and last >= OWN_PORTS.start:
        found = (
            f"Linux gives the ports {first}-{last} to any program, and the ranks use some of {ours}: they may be taken"
        )
        return Finding(name, "warning", found, 'sysctl -w net.ipv4.ip_local_port_range="32768 60999"')
    if isinstance(topology.launcher, TFConfig):
        own = split_address(topology.launcher.addresses[topology.rank])[1]
        inside = first <= own <= last
        fix = f"choose ports below {first}"
        found = f"{own}, from TF_CONFIG, is one that Linux may give to any program ({first}-{last})"
        return Finding(name, "warning", found, fix) if inside else Finding(name, "ok", f"{own}, from TF_CONFIG")
    return Finding(name, "ok", f"{ours}, apart from those that Linux assigns ({first}-{last})")


def check_clocks(clocks: Mapping[str, float], *, most_s: float) -> Finding:
    """Whether the clocks of the ranks, by name, agree; they were read at the same moment, within a second."""
    ordered = sorted(clocks.values())
    middle = ordered[len(ordered) // 2]
    off = {rank: clock - middle for rank, clock in clocks.items() if abs(clock - middle) > most_s}
    if off:
        found = ", ".join(f"{rank} is {abs(s):.0f} s {'ahead' if s > 0 else 'behind'}" for rank, s in off.items())
        fix = "start the time service on these nodes: systemctl restart chronyd (chronyc tracking shows it)"
        return Finding("clocks", "warning", f"{found}: times in logs and of files are wrong", fix)
    return Finding("clocks", "ok", f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(middle))}, the same on all ranks")


def _is_literal(host: str) -> bool:
    """Whether a host is given by its address."""
    return is_address(host) or host == "localhost"


def _is_loopback(address: Any) -> bool:
    try:
        return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
    except ValueError:
        return False
