r"""packing.py: each token of a tree once. Leaves that begin alike are computed as one row.

One by one, the leaves of a tree repeat its prompt and their common steps. A packed row holds each
token once, depth first. Three leaves "a b c", "a b d", "a e", 8 tokens, become a row of 5:

        a          row        a  b  c  d  e        sees    a  b  c  d  e
       / \         position   0  1  2  2  1           a    x
      b   e        end        5  4  3  4  5           b    x  x
     / \                                              c    x  x  x
    c   d                                             d    x  x     x
                                                      e    x           x

`end` is where a token's subtree ends, and the mask is one line: token i sees j where j <= i <
end[j]. Its position is its depth. Its log-prob comes from the hidden state of its parent: d's from
b. Then each leaf gathers the log-probs of its own tokens, so the loss knows nothing of rows: leaves
that share a token may differ in its advantage, old log-prob and weight.

With a mask, attention computes all pairs of a row, not their causal half. So `pack` finds the
cheapest rows, and long responses that share little keep their own. --packing false: all do.

    python -m pytest tests/runtime/test_packing.py
"""

import torch


def alone(sequences: list) -> list[list[int]]:
    """No packing: every sequence in a row of its own, as indices."""
    return [[i] for i in range(len(sequences))]


def row_cost(tokens: int, hidden: int, packed: bool) -> float:
    """Time of a pass, 1 being a token's matrix products. Measured on a CPU, hidden size 128, in us
    a token: causal rows of 64, 1,024, 2,048 tokens: 107, 203, 332; packed: 127, 294, 517."""
    return tokens * (1 + tokens / ((4 if packed else 7) * hidden))


def common(a: list[int], b: list[int]) -> int:
    """The number of tokens with which both begin."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return next(unequal, min(len(a), len(b)))


def pack(sequences: list, longest: int, hidden: int) -> list[list[int]]:
    """The cheapest rows, as indices of sequences; packed ones have at most `longest` tokens.

    In alphabetical order the leaves of a tree stand depth first. So a row is a run of neighbours:
    each adds what it does not share with the one before.
    """
    whole = [s.prompt_ids + s.tokens for s in sequences]
    order = sorted(range(len(whole)), key=lambda i: whole[i])
    shared = [common(whole[a], whole[b]) for a, b in zip(order, order[1:])]
    best = [(0.0, 0)]  # of the first n leaves: the least cost, and where their last row begins
    for n in range(1, len(order) + 1):
        tokens = len(whole[order[n - 1]])  # of a row that begins at `first` and ends with leaf n
        choices = [(best[n - 1][0] + row_cost(tokens, hidden, packed=False), n - 1)]
        for first in reversed(range(n - 1)):
            tokens += len(whole[order[first]]) - shared[first]
            if tokens > longest or not shared[first]:
                break
            choices.append((best[first][0] + row_cost(tokens, hidden, packed=True), first))
        best.append(min(choices))
    rows, n = [], len(order)
    while n:
        rows.append(order[best[n][1] : n])
        n = best[n][1]
    return rows[::-1]


def place(row: list) -> tuple[list[int], list[int], list[list[int]]]:
    """Of one row of sequences: tokens; where the subtree of each ends; the path of each leaf, which
    is the places of all its tokens, prompt first."""
    ids, ends, path, paths = [], [], [], []  # type: ignore[var-annotated]
    for leaf in row:
        whole = leaf.prompt_ids + leaf.tokens
        kept = common([ids[i] for i in path], whole)
        for i in path[kept:]:
            ends[i] = len(ids)  # another branch begins here
        path = path[:kept] + list(range(len(ids), len(ids) + len(whole) - kept))
        paths.append(path)
        ids += whole[kept:]
        ends += [0] * (len(whole) - kept)
    for i in path:
        ends[i] = len(ids)
    return ids, ends, paths


def lay_out(rows: list[list]) -> tuple:
    """Rows of sequences as one pass: ids, ends (R, T; None: no row is packed), parents, nodes (M,),
    leaves (N,). Token `nodes[m]` of the flat ids is predicted at `parents[m]`; `leaves` has an m
    for every token of every sequence. Padding (id 0) comes last and sees itself alone."""
    if not all(s.prompt_ids for row in rows for s in row):
        raise ValueError("a sequence needs at least one prompt token, which predicts its first")
    placed = [place(row) for row in rows]
    width = max(len(own) for own, _, _ in placed)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)
    before, wanted = [], []
    for r, (row, (own, own_ends, paths)) in enumerate(zip(rows, placed)):
        ids[r, : len(own)], ends[r, : len(own)] = torch.tensor(own), torch.tensor(own_ends)
        for leaf, path in zip(row, paths):
            start = len(leaf.prompt_ids)
            before += [r * width + i for i in path[start - 1 : -1]]
            wanted += [r * width + i for i in path[start:]]
    nodes, leaves = torch.tensor(wanted, dtype=torch.long).unique(return_inverse=True)
    parents = nodes.scatter(0, leaves, torch.tensor(before, dtype=torch.long))
    packed = any(len(row) > 1 for row in rows)
    return ids, ends if packed else None, parents, nodes, leaves


def tree_attention(ends: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a model must be told of packed rows. Without any: nothing, and its causal kernel."""
    if ends is None:
        return {}
    token = torch.arange(ends.shape[1], device=ends.device)
    mask = (token <= token[:, None]) & (token[:, None] < ends[:, None])  # (R, T, T): i sees j
    return {"attention_mask": mask[:, None], "position_ids": mask.sum(-1) - 1}
