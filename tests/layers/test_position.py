import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import Cache, RopeScaling, Rotary, resize_position_table
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
        rope = Rotary.at(torch.arange(4), K)
        for y in (rope(x.bfloat16()), rope.to(torch.bfloat16)(x.bfloat16())):
            assert y.dtype == torch.bfloat16
            assert_same(y, rope(x))


class TestRopeScaling:
    def test_linear_lays_positions_closer_together(self):
        x = torch.randn(1, 1, 4, K)
        positions = torch.arange(4)
        scaled = Rotary.at(positions, K, 100.0, RopeScaling("linear", 4.0))(x)
        assert_same(scaled, Rotary.at(positions / 4, K, 100.0)(x))

    def test_llama3_keeps_what_turns_fast_and_slows_what_turns_slowly(self):
        scaling = RopeScaling("llama3", 8.0, low_frequency=1.0, high_frequency=4.0, original_context=100)
        turns = torch.tensor([9.0, 4.0, 2.5, 1.0, 0.2], dtype=torch.float64)  # within the original context
        frequency = turns * 2 * torch.pi / 100
        share = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)  # of the frequency that is kept
        assert_same(scaling(frequency), share * frequency + (1 - share) * frequency / 8)


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


def put(cache, values, mask=None):
    """One step of one layer of one channel: values (B, T) are the keys, and negative the values."""
    x = torch.tensor(values, dtype=cache.keys.dtype)[:, None, :, None]
    cache.begin(x.shape[2])
    keys, negative, visible = cache.layer(0).append(x, -x)
    cache.advance(mask, x.shape[2])
    assert torch.equal(negative, -keys)
    return keys.flatten(1), visible


def new_cache(batch, capacity, **options):
    return Cache(1, batch, 1, capacity, 1, **options)


LEFT = torch.tensor([[True, True, True], [True, False, False]])  # row 1: one token, two of padding


class TestCache:
    def test_rows_of_one_length_need_no_mask(self):
        cache = new_cache(2, 8)
        assert cache.begin(3).tolist() == [0, 1, 2]
        keys, visible = put(cache, [[1, 2, 3], [10, 20, 30]])
        assert keys.tolist() == [[1, 2, 3], [10, 20, 30]] and visible is None
        assert cache.begin(2).tolist() == [3, 4]
        keys, visible = put(cache, [[4, 5], [40, 50]])
        assert keys.tolist() == [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]] and visible is None
        assert cache.lengths.tolist() == [5, 5] and cache.filled == 5 and cache.even

    def test_new_keys_stand_behind_each_row_and_padding_is_overwritten(self):
        cache = new_cache(2, 4)
        keys, visible = put(cache, [[1, 2, 3], [10, 0, 0]], LEFT)
        assert visible is None  # padding stands behind what is real, where causal attention does not look
        assert cache.lengths.tolist() == [3, 1] and not cache.even

        assert cache.begin(1).tolist() == [[3], [1]]
        keys, visible = put(cache, [[4], [11]])
        assert keys.tolist() == [[1, 2, 3, 4], [10, 11, 0, 0]]
        assert visible.flatten(1).tolist() == [[True] * 4, [True, True, False, False]]

    def test_several_new_tokens_see_themselves_and_what_came_before(self):
        cache = new_cache(2, 5)
        put(cache, [[1, 2, 3], [10, 0, 0]], LEFT)
        _, visible = put(cache, [[4, 5], [11, 12]])
        assert visible[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
        assert visible[1, 0].tolist() == [[True] * 2 + [False] * 3, [True] * 3 + [False] * 2]

    def test_one_token_on_a_cpu_looks_at_all_columns_if_few_are_empty(self):
        cache = new_cache(1, 8)
        put(cache, [[1, 2, 3, 4]])
        keys, visible = put(cache, [[5]])
        assert keys.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
        assert visible.tolist() == [[True] * 5 + [False] * 3]

    def test_else_its_width_changes_once_in_64_steps(self):
        cache = new_cache(1, 500)
        widths = [put(cache, [[i]])[0].shape[1] for i in range(300)]
        assert widths == [64] * 64 + [128] * 64 + [192] * 64 + [256] * 58 + [500] * 50

    def test_static_shapes_never_change(self):
        cache = new_cache(2, 6, static=True)
        assert cache.begin(3).tolist() == [[0, 1, 2], [0, 1, 2]]
        for values, mask in [([[1, 2, 3], [10, 0, 0]], LEFT), ([[4], [11]], None), ([[5], [12]], None)]:
            keys, visible = put(cache, values, mask)
            assert keys.shape == (2, 6) and visible.shape == (2, 1, len(values[0]), 6) and cache.filled == 0
        assert keys.tolist() == [[1, 2, 3, 4, 5, 0], [10, 11, 12, 0, 0, 0]]
        assert visible.flatten(1).sum(dim=1).tolist() == [5, 3]

    def test_rows_go_on_as_others_did(self):
        cache = new_cache(2, 4)
        put(cache, [[1, 2, 3], [10, 0, 0]], LEFT)
        cache.reorder(torch.tensor([1, 0, 1]))
        keys, _ = put(cache, [[4], [5], [6]])
        assert keys[:, :2].tolist() == [[10, 4], [1, 2], [10, 6]] and keys[1].tolist() == [1, 2, 3, 5]
        assert cache.lengths.tolist() == [2, 4, 2]

    def test_layers_are_apart(self):
        cache = Cache(2, batch=1, kv_heads=1, capacity=2, head_width=1)
        cache.begin(1)
        cache.layer(1).append(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
        assert cache.keys[:, 0, 0, 0, 0].tolist() == [0, 1]

    def test_a_full_cache(self):
        cache = new_cache(1, 2)
        put(cache, [[1]])
        with pytest.raises(ValueError, match="1 tokens and 2 more do not fit a cache made for 2"):
            cache.begin(2)
