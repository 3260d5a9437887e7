"""What must hold of an architecture, as assertions for a module of your own.

    from minivlm.testing import assert_causal, assert_padding_invariant

    def test_my_block():
        block = MyBlock(width=32).eval()
        assert_causal(block, torch.randn(2, 9, 32))

Each takes a callable on tensors (a module, a method, a lambda) and says what broke, where first, and by how much. The
callable must give the same answer twice: put a module with dropout or batch norm in eval mode. Values count as equal up
to `tolerance`, relative to the largest one expected; None is what rounding alone explains in the dtype at hand.

| an assertion                                                   | what it says                                      |
|----------------------------------------------------------------|---------------------------------------------------|
| assert_same, assert_same_gradients                             | two ways of one computation agree                 |
| assert_causal                                                  | the future does not leak into the past            |
| assert_padding_invariant, assert_batch_independent             | a row gets what it would get alone and unpadded   |
| assert_permutation_equivariant, assert_permutation_invariant   | order moves the results along, or changes nothing |
| assert_gradient_reaches, assert_gradient_does_not_reach        | who learns from a loss                            |
| assert_frozen                                                  | a part stays as it is while the rest is trained   |
| assert_keeps_no_activations                                    | a frozen part keeps nothing for a backward pass   |
| assert_generation_independent                                  | a row is answered as it would be alone            |
| assert_cache_equals_full                                       | decoding in pieces is the full forward            |
| assert_can_overfit                                             | the thing can learn at all                        |
| assert_zero_gates_change_nothing                               | closed gates are the model without them           |
| assert_images_seen_only_where_allowed                          | another image shows where it may be seen alone    |
| assert_later_image_changes_nothing_before                      | the text before an image does not know of it      |
"""

from minivlm.testing.images import (
    assert_images_seen_only_where_allowed,
    assert_later_image_changes_nothing_before,
    assert_zero_gates_change_nothing,
)
from minivlm.testing.learning import assert_can_overfit, assert_frozen, assert_keeps_no_activations
from minivlm.testing.structure import (
    assert_batch_independent,
    assert_cache_equals_full,
    assert_causal,
    assert_generation_independent,
    assert_padding_invariant,
    assert_permutation_equivariant,
    assert_permutation_invariant,
    changed,
)
from minivlm.testing.values import (
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_same,
    assert_same_gradients,
)

__all__ = [
    "assert_batch_independent",
    "assert_cache_equals_full",
    "assert_can_overfit",
    "assert_causal",
    "assert_frozen",
    "assert_generation_independent",
    "assert_gradient_does_not_reach",
    "assert_gradient_reaches",
    "assert_images_seen_only_where_allowed",
    "assert_keeps_no_activations",
    "assert_later_image_changes_nothing_before",
    "assert_padding_invariant",
    "assert_permutation_equivariant",
    "assert_permutation_invariant",
    "assert_same",
    "assert_same_gradients",
    "assert_zero_gates_change_nothing",
    "changed",
]
