"""Run by test_compile.py: two processes train with compiled blocks, one without; the difference is printed as JSON.

python -m tests.distributed.compiled_runs FOLDER
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch._dynamo.utils import counters

from nestling.train import compile as compiling
from tests.distributed.programs import begun, difference, quiet_run, together
from tests.distributed.train_runs import config_of
from tests.train.small_runs import with_train


def main() -> None:
    folder = begun()
    compiling.BACKEND = "aot_eager"
    made = config_of()
    made = replace(made, model=replace(made.model, name="hope-attention", periods=(16.0,)))
    made = with_train(made, length=16, stream_length=64)  # whole segments, where no document ends
    quiet_run(made, folder / "one", folder)
    spread = replace(with_train(made, compile=True), parallel=replace(made.parallel, recompute=True))

    def work(rank: int) -> None:
        quiet_run(spread, folder / "two", folder)
        found: dict[str, Any] = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
        (folder / f"graphs-{rank}.json").write_text(json.dumps(found))

    together(2, folder, work)
    graphs = [json.loads((folder / f"graphs-{rank}.json").read_text()) for rank in range(2)]
    print(json.dumps({"apart": difference(folder / "two", folder / "one"), "graphs": graphs}), flush=True)


if __name__ == "__main__":
    main()
