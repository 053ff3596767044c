"""What stands beside results."""

import json
import platform
import re

import torch

from nestling.evals import provenance
from nestling.evals.record import processor


def test_provenance_says_where_and_when() -> None:
    found = json.loads(json.dumps(provenance()))
    assert set(found) == {"commit", "versions", "hardware", "threads", "date"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,12}(-dirty)?", found["commit"])
    assert processor()
    assert re.search(r", [1-9]\d* cores", found["hardware"])
