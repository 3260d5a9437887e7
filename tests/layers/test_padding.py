import torch

from minivlm.layers.padding import padding_first, padding_last

X = torch.tensor([[0, 5, 6, 0, 7], [8, 0, 0, 9, 0]])
MASK = X != 0


def test_padding_moves_to_one_side_and_the_rest_keeps_its_order():
    tokens, mask = padding_last(X, MASK)
    assert tokens.tolist() == [[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]] and torch.equal(mask, tokens != 0)
    tokens, mask = padding_first(X, MASK)
    assert tokens.tolist() == [[0, 0, 5, 6, 7], [0, 0, 0, 8, 9]] and torch.equal(mask, tokens != 0)
    assert torch.equal(padding_first(X, None)[0], X) and padding_first(X, None)[1].all()


def test_embeddings_move_as_their_tokens_do():
    x = X[..., None] * torch.tensor([1, 10])
    for move in (padding_last, padding_first):
        moved, mask = move(x, MASK)
        assert torch.equal(moved[..., 0], move(X, MASK)[0]) and torch.equal(mask, move(X, MASK)[1])
