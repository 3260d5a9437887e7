import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import Cache, Rotary, resize_position_table
from minivlm.testing import assert_same

K = 8


class TestRotary:
    def test_turns_each_pair_by_its_angle(self):
        x = torch.randn(1, 1, 3, K)
        y = Rotary.at(torch.tensor([0, 1, 5]), K, theta=100.0)(x)
        for t, position in enumerate([0, 1, 5]):
            for i in range(K // 2):  # channel i is paired with i + K/2
                angle = torch.tensor(position * 100.0 ** (-2 * i / K))
                a, b = x[0, 0, t, i], x[0, 0, t, i + K // 2]
                turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])
                assert_same(y[0, 0, t, [i, i + K // 2]], turned)

    def test_scores_depend_on_the_distance_alone(self):
        q, k = torch.randn(1, 1, 1, K).double(), torch.randn(1, 1, 1, K).double()

        def score(at_q, at_k):
            return (Rotary.at(torch.tensor([at_q]), K)(q) * Rotary.at(torch.tensor([at_k]), K)(k)).sum()

        for shift in (1, 17, 400):
            assert_same(score(7 + shift, 3 + shift), score(7, 3), tolerance=1e-5)  # the angles are computed in float32
        assert (score(8, 3) - score(7, 3)).abs() > 1e-3

    def test_keeps_the_norm(self):
        x = torch.randn(2, 3, 50, K)
        assert_same(Rotary.at(torch.arange(50), K)(x).norm(dim=-1), x.norm(dim=-1))

    def test_position_zero_stays(self):
        x = torch.randn(1, 2, 1, K)
        assert torch.equal(Rotary.at(torch.tensor([0]), K)(x), x)

    def test_rows_with_positions_of_their_own(self):
        x = torch.randn(2, 3, 4, K)
        positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
        y = Rotary.at(positions, K)(x)
        for i in range(2):
            assert torch.equal(y[i : i + 1], Rotary.at(positions[i], K)(x[i : i + 1]))

    def test_keeps_the_dtype(self):
        x = torch.randn(1, 1, 4, K)
        y = Rotary.at(torch.arange(4), K)(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert_same(y, Rotary.at(torch.arange(4), K)(x))


class TestResize:
    def test_the_size_it_was_made_for_is_the_same_tensor(self):
        table = torch.randn(1 + 9, 5)
        assert resize_position_table(table, (3, 3), leading=1) is table

    @pytest.mark.parametrize("leading", [0, 1, 2])
    def test_interpolates_rows_and_columns_and_leaves_the_leading_ones(self, leading):
        table = torch.randn(leading + 9, 5)
        resized = resize_position_table(table, (2, 6), leading=leading)
        assert torch.equal(resized[:leading], table[:leading])
        for d in range(5):  # channel by channel; h comes before w
            grid = table[leading:, d].view(1, 1, 3, 3)
            expected = F.interpolate(grid, size=(2, 6), mode="bicubic", align_corners=False)
            assert_same(resized[leading:, d], expected.flatten())

    def test_a_constant_table_stays_constant(self):
        assert_same(resize_position_table(torch.full((16, 3), 0.7), (7, 5)), torch.full((35, 3), 0.7))

    def test_a_grid_with_as_many_patches_but_another_shape_is_resized(self):
        table = torch.randn(16, 3)
        assert not torch.equal(resize_position_table(table, (2, 8)), table)

    def test_carries_gradients_and_the_dtype(self):
        table = torch.randn(9, 3, dtype=torch.bfloat16, requires_grad=True)
        resized = resize_position_table(table, (4, 4))
        assert resized.dtype == torch.bfloat16
        resized.sum().backward()
        assert (table.grad != 0).all()

    def test_not_a_square(self):
        with pytest.raises(ValueError, match="8 patch positions are not a square grid"):
            resize_position_table(torch.randn(8, 3), (4, 4))


class TestCache:
    def test_new_keys_stand_behind_each_row_and_padding_is_overwritten(self):
        cache = Cache(1, batch=2, kv_heads=1, capacity=4, head_width=1)
        prompt = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]]).view(2, 1, 3, 1)  # row 1: one token, two of padding
        mask = torch.tensor([[True, True, True], [True, False, False]])
        assert cache.begin(3).tolist() == [[0, 1, 2], [0, 1, 2]]
        keys, values, visible = cache.layer(0).append(prompt, -prompt, mask)
        assert visible[0, 0].tolist() == [[True, False, False, False], [True, True, False, False], [True] * 3 + [False]]
        cache.advance(mask, 3)
        assert cache.lengths.tolist() == [3, 1]

        assert cache.begin(1).tolist() == [[3], [1]]
        new = torch.tensor([4.0, 11.0]).view(2, 1, 1, 1)
        keys, values, visible = cache.layer(0).append(new, -new, None)
        assert keys.flatten(1).tolist() == [[1, 2, 3, 4], [10, 11, 0, 0]]
        assert torch.equal(values, -keys)
        assert visible.flatten(1).tolist() == [[True] * 4, [True, True, False, False]]

    def test_layers_are_apart(self):
        cache = Cache(2, batch=1, kv_heads=1, capacity=2, head_width=1)
        cache.begin(1)
        cache.layer(1).append(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), None)
        assert cache.keys[:, 0, 0, 0, 0].tolist() == [0, 1]

    def test_a_full_cache_does_not_overwrite(self):
        cache = Cache(1, batch=1, kv_heads=1, capacity=2, head_width=1)
        cache.begin(3)
        x = torch.ones(1, 1, 3, 1)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cache.layer(0).append(x, x, None)
