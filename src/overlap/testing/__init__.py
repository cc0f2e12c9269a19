"""Tools for tests of overlap and of programs that embed it: a simulated device, a tiny exact model, `check_stream`."""

from overlap.streams.sim import SimDevice, SimTimeline
from overlap.testing.conformance import check_stream
from overlap.testing.echo import EchoModel, SimRunner

__all__ = ["EchoModel", "SimDevice", "SimRunner", "SimTimeline", "check_stream"]
