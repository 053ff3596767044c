"""Results that nobody measured, to test what is said about them."""

from dataclasses import replace

from nestling.demo.results import HeldOut, Memory, Read, Results, Samples, Training
from nestling.evals import Forgetting, Writes

PATH = "blocks.0.channel.stack.0"


def read(second_half: float, *, writes: bool = False) -> Read:
    """A reading; only the second half is asked about."""
    made = tuple(Writes(tokens=64 * n, norms={PATH: 0.01 * n}, counts=(float(n),)) for n in (1, 2))
    none = (Writes(tokens=128, norms={}, counts=()),)
    return Read(
        whole=second_half + 0.1,
        first_half=second_half + 0.2,
        second_half=second_half,
        by_position=((16.0, second_half + 0.2), (48.0, second_half)),
        writes=made if writes else none,
        seconds=1.25,
    )


def results(**changes) -> Results:
    """Hope 1.8 against 2.0 nats, 1.75 against 2.2 and 2.1 at length; reading 2.4 learning, 3.0 frozen, 3.2."""
    training = Training(
        parameters=1234567, steps=10, tokens=20480, seconds=61.0, validation=((10240, 2.5), (20480, 2.0))
    )
    points = ((8.0, 2.0), (24.0, 1.9))
    made = Results(
        quick=False,
        seed=7,
        length=16,
        trained_on="shakespeare",
        read="emma",
        read_tokens=4321,
        training={"hope": training, "transformer": replace(training, parameters=1234000)},
        held_out={
            "hope": HeldOut(short=1.8, long=1.75, by_position=points),
            "transformer": HeldOut(short=2.0, long=2.2, by_position=points),
            "transformer-window": HeldOut(short=2.0, long=2.1, by_position=points),
        },
        reading={"hope-learning": read(2.4, writes=True), "hope-frozen": read(3.0), "transformer": read(3.2)},
        forgetting=Forgetting(before=1.8, after=1.836, windows=4, length=16),
        memory=Memory(
            file="memory.safetensors", bytes=98765, tensors=12, equal_state=True, equal_reading=True, next=99
        ),
        samples=Samples(prompt="Emma <& ", before="</script><b>", after="was & is"),
        machine={
            "commit": None,
            "versions": {"nestling": "0", "torch": "9"},
            "hardware": "a processor, 2 cores",
            "threads": 1,
            "date": "2030-01-02",
        },
        configs={"hope": {}, "transformer": {}},
        seconds=321.0,
    )
    return replace(made, **changes)
