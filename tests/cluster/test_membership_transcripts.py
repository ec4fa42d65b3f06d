"""The machine says today what it said when its transcripts were read and found right.

A transcript is a text file: `agent NAME founder|follower MIN MAX [SPARES]`, then events (`> ...`),
each followed by the actions it causes (`< ...`). Members are named by letters, `name*workers` if
those are not one, spares in brackets. To write the actions anew after a deliberate change:
`PYTHONPATH=tests python tests/cluster/test_membership_transcripts.py`, then read the difference.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_network import TIMING, member

from outlast.cluster import event as ev
from outlast.cluster.membership import Membership
from outlast.cluster.roster import Seats
from outlast.cluster.view import Member, View

FOLDER = Path(__file__).parent / "transcripts"


def expanded(data: object) -> object:
    """Letters for members and views become the real thing: `member`, `value` and `members`."""
    if isinstance(data, dict):
        full = {key: expanded(value) for key, value in data.items()}
        if isinstance(full.get("member"), str):
            full["member"] = described(str(full["member"])).as_json()
        for key in ("members", "value"):
            if isinstance(full.get(key), str):
                full[key] = [described(name).as_json() for name in str(full[key]).split()]
        if isinstance(full.get("accepted"), list):
            ballot, value = full["accepted"]  # type: ignore[misc]
            full["accepted"] = [ballot, [described(name).as_json() for name in value.split()]]
        return full
    return [expanded(value) for value in data] if isinstance(data, list) else data


def described(text: str) -> Member:
    """A member from `name`, `name*workers` or either in brackets."""
    name, _, workers = text.strip("()").partition("*")
    return replace(member(name, workers=int(workers or 1)), spare=text.startswith("("))


def shortened(data: object) -> object:
    """The inverse of `expanded`."""
    if isinstance(data, dict) and "agent" in data and "workers" in data:
        count = len(data["workers"])
        text = data["agent"] if count == 1 else f"{data['agent']}*{count}"
        return f"({text})" if data["spare"] else text
    if isinstance(data, dict):
        return {key: shortened(value) for key, value in data.items()}
    if isinstance(data, list):
        short = [shortened(value) for value in data]
        members = data and all(isinstance(v, dict) and "workers" in v for v in data)
        return " ".join(map(str, short)) if members else short
    return data


def event(line: str) -> ev.Event:
    """The event of a line without its mark."""
    time, kind, *rest = line.split(" ", 3)
    now = float(time)
    match kind, rest:
        case "tick", []:
            return ev.Tick(now)
        case "connected", [agent]:
            return ev.Connected(now, agent)
        case "disconnected", [agent, cause]:
            return ev.Disconnected(now, agent, cause)
        case "received", [agent, message]:
            return ev.Received(now, agent, expanded(json.loads(message)))  # type: ignore[arg-type]
        case "described", [text]:
            return ev.Described(now, described(text))
        case "ready", []:
            return ev.Ready(now)
        case "asked", []:
            return ev.Asked(now)
    raise ValueError(line)


def written(action: ev.Action) -> str:
    """An action as one line."""

    def names(view: View) -> str:
        return f"{view.generation} {shortened(view.as_json()['members'])}"

    match action:
        case ev.Send(to, message):
            return f"send {to} {json.dumps(shortened(message))}"
        case ev.Dial(host, port):
            return f"dial {host}:{port}"
        case ev.Install(view, proposer, detected):
            return f"install {names(view)} by {proposer}, detected {detected}"
        case ev.Running(view) | ev.Evicted(view):
            return f"{type(action).__name__.lower()} {names(view)}"
        case ev.NoQuorum(view, alive):
            return f"no quorum of {names(view)} in {' '.join(alive)}"
        case ev.Learned(other):
            return f"learned {shortened(other.as_json())}"
        case ev.Suspect(agent, node, cause):
            return f"suspect {agent} on {node}: {cause}"
        case ev.Failed(reason):
            return f"failed: {reason}"


def replayed(text: str) -> str:
    """The transcript with the actions that the machine takes now."""
    lines = [line for line in text.splitlines() if not line.startswith("<")]
    machine, out = None, []
    for line in lines:
        out.append(line)
        if line.startswith("agent "):
            _, name, role, *counts = line.split()
            seats = Seats(*map(int, counts))
            machine = Membership(member(name), TIMING, seats, founder=role == "founder")
        elif line.startswith(">"):
            assert machine is not None
            out += [f"< {written(action)}" for action in machine.on(event(line[2:]))]
            machine.check()
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert replayed(text) == text


def test_there_are_transcripts() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 6


if __name__ == "__main__":
    for transcript in FOLDER.glob("*.txt"):
        transcript.write_text(replayed(transcript.read_text(encoding="utf-8")), encoding="utf-8")
