"""What may be said about the numbers of one run. Every word that judges is chosen by a number."""

from __future__ import annotations

from nestling.demo.results import Results


def change(value: float, reference: float) -> str:
    """How `value` compares with `reference`, e.g. "3.1 % lower than"."""
    percent = 100 * (value / reference - 1)
    if abs(percent) < 0.05:
        return "within 0.05 % of"
    return f"{abs(percent):.1f} % {'lower' if percent < 0 else 'higher'} than"


def sentences(r: Results) -> list[str]:
    """The findings, in the order of the report."""
    found = [training(r), length(r), reading(r), against_transformer(r), forgetting(r), memory(r)]
    return [*found, caveat(r)]


def training(r: Results) -> str:
    hope, other = r.held_out["hope"].short, r.held_out["transformer"].short
    return (
        f"On held-out {r.trained_on}, in windows of {r.length} tokens, Hope's loss is {hope:.4f} nats per token, "
        f"{change(hope, other)} that of Transformer++ ({other:.4f}) of equal parameters on the same tokens."
    )


def length(r: Results) -> str:
    hope = r.held_out["hope"].long
    names = {"transformer": "full attention", "transformer-window": f"a window of {r.length}"}
    best = min(names, key=lambda name: r.held_out[name].long)
    return (
        f"At 4 times the training length Hope's loss is {hope:.4f}, {change(hope, r.held_out[best].long)} the better "
        f"of two Transformers++, the one with {names[best]} ({r.held_out[best].long:.4f})."
    )


def reading(r: Results) -> str:
    learning, frozen = r.reading["hope-learning"].second_half, r.reading["hope-frozen"].second_half
    return (
        f"Reading {r.read}, Hope with learning on needs {learning:.4f} bits per byte over the second half, "
        f"{change(learning, frozen)} the same Hope with its CMS frozen ({frozen:.4f})."
    )


def against_transformer(r: Results) -> str:
    learning, other = r.reading["hope-learning"].second_half, r.reading["transformer"].second_half
    return f"That is {change(learning, other)} Transformer++ with a window of {r.length} ({other:.4f})."


def forgetting(r: Results) -> str:
    lost = r.forgetting
    return (
        f"With what it learned and an empty context, its loss on held-out {r.trained_on} is {lost.after:.4f} nats, "
        f"{change(lost.after, lost.before)} before reading ({lost.before:.4f})."
    )


def memory(r: Results) -> str:
    kept = r.memory
    start = f"The memory is a file of {kept.bytes:,} bytes. A new process loaded the model and the file: "
    if kept.equal:
        return start + (
            f"all {kept.tensors} tensors came back with equal bits, and reading the next {kept.next:,} tokens gave "
            f"equal bits too."
        )
    state = "equal" if kept.equal_state else "NOT equal"
    losses = "equal" if kept.equal_reading else "NOT equal"
    return start + f"its tensors are {state}, its losses on the next {kept.next:,} tokens are {losses}."


def caveat(r: Results) -> str:
    short = "This was a quick check of the parts; its numbers mean nothing. " if r.quick else ""
    return short + (
        "All numbers are of one seed and one short training run: a demonstration, not evidence that a model is better."
    )
