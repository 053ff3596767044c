"""How a model learns one task after the other: one file per method, the same for classes, domains and translations.

    fine_tuning.py    Adam on every example as it passes, with an optional penalty and replayed examples
    ewc.py            the penalty of elastic weight consolidation
    replay.py         a reservoir of earlier examples
    lora.py           low-rank adapters (peft) in the place of the weights
    cms.py            levels written by the CMS rule, the stream being one sequence; nothing else changes
    memory_head.py    a classifier's last layer as an associative memory, exact ridge regression written block by block
    gaussian.py       nearest class mean, linear discriminant (LDA) and KLDA on frozen features
    in_context.py     examples in the context of the frozen model; InCA: the classes are narrowed down first
    classifier.py     texts to features to classes, the same for every method

A method is given a loss of examples and asked to `learn` a task; `reading()` is the context in which it is read.
"""

COLOURS = {  # of the methods, in every figure
    "Hope-1": "#9ac1e6",
    "Hope-2": "#4a90c8",
    "Hope-3": "#1a4f7a",
    "one period": "#5e4fa2",
    "one period (2)": "#9e8fd0",
    "one period (3)": "#5e4fa2",
    "frozen": "#8a8a8a",
    "sequential": "#c05621",
    "LoRA": "#d69e2e",
    "EWC": "#b83280",
    "replay": "#2f855a",
    "joint": "#2f855a",
}
