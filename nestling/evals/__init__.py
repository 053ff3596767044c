"""Evaluations: they know no architecture, only models that read tokens with a state.

perplexity(model, windows)                  # perplexity.py: loss by position and by context length
read_text(model, tokens, learn=True)        # reading.py: loss and writes over a text, state carried
forgetting(model, state, windows)           # reading.py: what it cost on the training domain
frontier(model, text, windows, rates, ...)  # frontier.py: gain against forgetting over rates
chosen_rate(curves, limit)                  # frontier.py: the rate that is safe on texts other than the reported one
continual(scores)                           # continual.py: average, forgetting, transfer over a row of tasks
score(model, language, n, lengths, seed=0)  # suite.py: right answers on examples made by seed
knowledge(model, tokenizer, passages)       # knowledge.py: a passage is read, its context cleared, then it is asked
LANGUAGES, MAD, MQAR(pairs=8)               # the tasks; NEEDLES and needle_score: needles.py
needle_score(model, records(entries, tokenizer), n, lengths, seed=0)   # in_context_recall.py: SWDE, FDA, SQuAD style
common_sense(as_lm(model, tokenizer))       # common_sense.py, lm_harness.py: HellaSwag, PIQA, ... through lm-eval
read_stories, BABILongTask, babilong_score  # babilong.py: facts of bAbI in a book
paired(a, b)                                # statistics.py: 95 % t-interval of differences over seeds
"""

from nestling.evals.babilong import (
    BABILONG,
    BABILongScore,
    BABILongTask,
    Question,
    Story,
    babilong_score,
    parse_stories,
    read_stories,
)
from nestling.evals.common_sense import common_sense
from nestling.evals.continual import Continual, continual
from nestling.evals.formal_languages import LANGUAGES, Language
from nestling.evals.frontier import (
    FORGETTING,
    Curve,
    Point,
    Setting,
    chosen_rate,
    differences_over_seeds,
    frontier,
    gains_over_seeds,
    reconfigured,
    settings,
)
from nestling.evals.knowledge import Condition, facts, knowledge, less_bits
from nestling.evals.lm_harness import Accuracy, accuracies, as_lm
from nestling.evals.mad import MAD, MADTask
from nestling.evals.mqar import MQAR
from nestling.evals.needles import NEEDLES, Needle, NeedleScore, NeedleTask, needle_score
from nestling.evals.perplexity import (
    ContextLoss,
    Loss,
    PerplexityResult,
    PositionLoss,
    bits_per_byte,
    perplexity,
    window_losses,
)
from nestling.evals.protocol import Reads, token_losses
from nestling.evals.reading import (
    Forgetting,
    ReadResult,
    Writes,
    domain_loss,
    forgetting,
    gain_percent,
    read_text,
)
from nestling.evals.record import provenance
from nestling.evals.statistics import Interval, interval, paired, t_quantile, verdict
from nestling.evals.suite import Examples, Score, Task, score, table

__all__ = [
    "BABILONG",
    "FORGETTING",
    "LANGUAGES",
    "MAD",
    "MQAR",
    "NEEDLES",
    "Accuracy",
    "BABILongScore",
    "BABILongTask",
    "Condition",
    "ContextLoss",
    "Continual",
    "Curve",
    "Examples",
    "Forgetting",
    "Interval",
    "Language",
    "Loss",
    "MADTask",
    "Needle",
    "NeedleScore",
    "NeedleTask",
    "PerplexityResult",
    "Point",
    "PositionLoss",
    "Question",
    "ReadResult",
    "Reads",
    "Score",
    "Setting",
    "Story",
    "Task",
    "Writes",
    "accuracies",
    "as_lm",
    "babilong_score",
    "bits_per_byte",
    "chosen_rate",
    "common_sense",
    "continual",
    "differences_over_seeds",
    "domain_loss",
    "facts",
    "forgetting",
    "frontier",
    "gain_percent",
    "gains_over_seeds",
    "interval",
    "knowledge",
    "less_bits",
    "needle_score",
    "paired",
    "parse_stories",
    "perplexity",
    "provenance",
    "read_stories",
    "read_text",
    "reconfigured",
    "score",
    "settings",
    "t_quantile",
    "table",
    "token_losses",
    "verdict",
    "window_losses",
]
