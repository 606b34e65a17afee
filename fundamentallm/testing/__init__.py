"""The kit that plugin authors test with: tiny real runs, a recorder, and contracts to pass.

Installing fundamentallm makes the fixtures ``tiny_run`` and ``two_processes`` known to pytest. A
plugin's suite is at least this, which is some ten tests::

    class TestContract(PluginContract):
        plugin = EarlyStopping

A logger's suite subclasses ``LoggerContract``, which reads the rows back.
"""

from fundamentallm.testing.contracts import HEAVY as HEAVY
from fundamentallm.testing.contracts import PluginContract as PluginContract
from fundamentallm.testing.host_reads import HostReads as HostReads
from fundamentallm.testing.loggers import LoggerContract as LoggerContract
from fundamentallm.testing.processes import Trained as Trained
from fundamentallm.testing.processes import TwoProcesses as TwoProcesses
from fundamentallm.testing.processes import in_processes as in_processes
from fundamentallm.testing.processes import two_processes as two_processes
from fundamentallm.testing.recorder import Memory as Memory
from fundamentallm.testing.recorder import Recorder as Recorder
from fundamentallm.testing.recorder import assert_same_weights as assert_same_weights
from fundamentallm.testing.recorder import weights as weights
from fundamentallm.testing.tiny import TINY as TINY
from fundamentallm.testing.tiny import TinyData as TinyData
from fundamentallm.testing.tiny import TinyModel as TinyModel
from fundamentallm.testing.tiny import TinyOptimizer as TinyOptimizer
from fundamentallm.testing.tiny import TinyParts as TinyParts
from fundamentallm.testing.tiny import TinyRun as TinyRun
from fundamentallm.testing.tiny import TinySamples as TinySamples
from fundamentallm.testing.tiny import Traced as Traced
from fundamentallm.testing.tiny import compose_tiny as compose_tiny
from fundamentallm.testing.tiny import period as period
from fundamentallm.testing.tiny import tiny_parts as tiny_parts
from fundamentallm.testing.tiny import tiny_run as tiny_run
