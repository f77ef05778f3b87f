"""An agent that is started before its command is known.

The agent imports torch, which takes longer than composing and checking a configuration. So the agent is started first: it
imports torch while the launcher composes, and then reads its arguments and environment from a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from train.faults.process import die_with_parent

OPTION = "--arguments-from"
"""The option of `launch.agent` that names a file descriptor; the agent reads its arguments from it."""


class AgentAhead:
    """A process of `launch.agent` that waits for its arguments, and ends if none come."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        read, self._write = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.agent", OPTION, str(read)],
                env=environment,
                pass_fds=[read],
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        finally:
            os.close(read)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Send the agent its command, and return its process.

        Args:
            command: The command made by `launch.command.accelerate_command`.
            environment: The environment variables that replace the agent's.
        """
        message = json.dumps({"arguments": list(command[3:]), "environment": dict(environment)})
        # If the agent has already ended, its exit code tells why.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._write, "w", encoding="utf-8") as pipe:
            self._write = -1
            pipe.write(message)
        return self.process

    def dismiss(self) -> None:
        """Kill the agent if it got no command; otherwise do nothing."""
        if self._write >= 0:
            # The agent may still be importing torch, and has nothing to clean up.
            self.process.kill()
            self.process.wait()
            os.close(self._write)
            self._write = -1


@contextlib.contextmanager
def agent_ahead(environment: Mapping[str, str]) -> Iterator[AgentAhead]:
    """Start an agent, and kill it on exit if it got no command."""
    agent = AgentAhead(environment)
    try:
        yield agent
    finally:
        agent.dismiss()


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the agent's arguments: those of its command line, or those that the launcher sends through a pipe.

    The launcher also sends environment variables, which replace those of this process. The process exits if the launcher
    ends without sending anything.
    """
    if list(arguments[:1]) != [OPTION]:
        return list(arguments)
    with os.fdopen(int(arguments[1]), encoding="utf-8") as pipe:
        text = pipe.read()
    if not text:
        sys.exit(0)
    message = json.loads(text)
    os.environ.clear()
    os.environ.update(message["environment"])
    return list(message["arguments"])
