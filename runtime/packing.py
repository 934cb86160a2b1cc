r"""packing.py: compute each token of a tree once. Leaves with a common beginning form one row.

Computed one by one, the leaves of a tree repeat its prompt and their common steps. A packed row has
each token once, depth first. Three leaves "a b c", "a b d", "a e", 8 tokens, become a row of 5:

        a          row        a  b  c  d  e        sees    a  b  c  d  e
       / \         position   0  1  2  2  1           a    x
      b   e        end        5  4  3  4  5           b    x  x
     / \                                              c    x  x  x
    c   d                                             d    x  x     x
                                                      e    x           x

`end` is where a token's subtree ends, and the mask is one line: token i sees j where j <= i <
end[j]. Its position is its depth. Its log-prob comes from the hidden state of its parent: d's from
b. Then each leaf gathers the log-probs of its tokens, so the loss does not see rows: leaves that
share a token may differ in its advantage, old log-prob and weight.

With a mask, attention computes all pairs of a row, not only the causal half. So `pack` finds the
cheapest rows, and long responses that share little get separate rows. --packing false: all do.

    python -m pytest tests/runtime/test_packing.py
"""

import torch


def alone(sequences: list) -> list[list[int]]:
    """No packing: one row per sequence, as indices."""
    return [[i] for i in range(len(sequences))]


def row_cost(tokens: int, hidden: int, packed: bool) -> float:
    """Time of a pass, in units of one token's matrix products. Measured on a CPU, hidden size 128,
    in us per token: causal rows of 64, 1,024, 2,048 tokens: 107, 203, 332; packed: 127, 294,
    517."""
    return tokens * (1 + tokens / ((4 if packed else 7) * hidden))


def common(a: list[int], b: list[int]) -> int:
    """The number of first tokens that both have in common."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    return next(unequal, min(len(a), len(b)))


def pack(sequences: list, longest: int, hidden: int) -> list[list[int]]:
    """The cheapest rows, as indices of sequences; packed rows have at most `longest` tokens.

    Sorted by tokens, the leaves of a tree are in depth-first order. So a row is a run of
    neighbours: each adds the tokens that it does not share with the one before.
    """
    whole = [s.prompt_ids + s.tokens for s in sequences]
    order = sorted(range(len(whole)), key=lambda i: whole[i])
    shared = [common(whole[a], whole[b]) for a, b in zip(order, order[1:])]
    best = [(0.0, 0)]  # for the first n leaves: lowest cost, and the beginning of their last row
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
    """For one row of sequences: its tokens; where the subtree of each token ends; the path of each
    leaf, which is the places of all its tokens, prompt first."""
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
    for every token of every sequence. Padding (id 0) comes last and only sees itself."""
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
    """Arguments of the model for packed rows. Without packed rows: none, so it runs causal."""
    if ends is None:
        return {}
    token = torch.arange(ends.shape[1], device=ends.device)
    mask = (token <= token[:, None]) & (token[:, None] < ends[:, None])  # (R, T, T): i sees j
    return {"attention_mask": mask[:, None], "position_ids": mask.sum(-1) - 1}
