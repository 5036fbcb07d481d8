"""Settings that every test process and its children need, whoever starts pytest."""

from __future__ import annotations

import os

import hypothesis

# A local ray.init() of Ray >= 2.59 turns token authentication on behind one's back.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tests run beside each other's processes on few cores: OpenMP's spinning threads would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# An example's time says more about what else runs on the machine than about the code.
hypothesis.settings.register_profile("arriero", deadline=None)
hypothesis.settings.load_profile("arriero")
