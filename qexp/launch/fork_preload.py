"""Imports for the process that jobs are forked from (see `job_process`), which alone imports this module.

What every job would import is imported here once. No thread may be started, nor anything computed with torch: a forked
process has none of its parent's threads, and would wait for those of OpenMP for ever.
"""

import contextlib
import gc

from qexp.system import processes

processes.end_with_parent()
processes.ignore_terminal_signals()

import torch  # noqa: E402
import torch.utils.serialization.config  # noqa: E402
from PIL import Image  # noqa: E402

from qexp import __main__  # noqa: E402, F401
from qexp.launch import job_process  # noqa: E402, F401
from qexp.models import architectures  # noqa: E402, F401
from qexp.pipeline import run, run_files  # noqa: E402, F401
from qexp.quantize.flows import usable_flows  # noqa: E402
from qexp.report import charts  # noqa: E402, F401

with contextlib.suppress(ImportError):  # of a torch without torch.ao
    from qexp.quantize.torch_backend import emulation, layer_equivalence, layer_errors  # noqa: F401
list(usable_flows())
# Cached, so that all jobs of a sweep record the same commit.
run_files.git_sha()
# Libraries look these up once, when they are first used.
Image.init()
torch.overrides.get_overridable_functions()
# Keeps what was imported out of every job's garbage collection, so that its memory stays shared.
gc.collect()
gc.freeze()
