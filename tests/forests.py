"""forests.py: responses with continuations, by hand and random, for the tests of trees and
advantages."""

from hypothesis import settings
from hypothesis import strategies as st

from tree import Continuation, Response

PROMPT = [901, 902, 903]


quick = settings(max_examples=150, deadline=None)


def response(tokens, reward, *continuations):
    """continuations: (at, tokens, reward). Token t has behaviour log-prob -t / 100: it shows where
    it comes from."""
    return Response(
        tokens,
        [-t / 100 for t in tokens],
        reward,
        continuations=[
            Continuation(at, new, [-t / 100 for t in new], r) for at, new, r in continuations
        ],
    )


floats = st.floats(-1e9, 1e9, allow_subnormal=False)


binary = st.sampled_from([0.0, 1.0])


@st.composite
def forests(draw, rewards=None):
    """1 to 5 responses of 1 to 8 tokens with up to 4 continuations each; every sampled token has an
    id of its own."""
    rewards = rewards if rewards is not None else draw(st.sampled_from([binary, floats]))
    fresh = iter(range(100, 10_000))
    forest = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 8))
        tokens = [next(fresh) for _ in range(length)]
        cuts = draw(st.lists(st.integers(1, length - 1), max_size=4)) if length > 1 else []
        forest.append(
            response(
                tokens,
                draw(rewards),
                *(
                    (at, [next(fresh) for _ in range(draw(st.integers(0, 4)))], draw(rewards))
                    for at in cuts
                ),
            )
        )
    return forest
