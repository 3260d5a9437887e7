import pytest
import torch

from minivlm.layers.regions import (
    UNITERRegions,
    ViLBERTRegions,
    VisualBERTRegions,
    grid_cells,
    location,
    pool_regions,
)
from minivlm.testing import assert_same

BOXES = torch.tensor([[[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 1.0, 0.75]]])


def test_cells_are_numbered_row_by_row():
    expected = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert grid_cells(4).tolist() == expected
    with pytest.raises(ValueError, match="5 features are not a square grid: give the boxes"):
        grid_cells(5)


def test_the_box_of_a_cell_gives_its_features_and_that_of_all_the_mean():
    features = torch.randn(2, 9, 5)
    assert_same(pool_regions(features, grid_cells(9).expand(2, 9, 4)), features)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(2, 1, 4)
    assert_same(pool_regions(features, whole), features.mean(dim=1, keepdim=True))


def test_cells_count_by_how_much_of_them_is_in_the_box():
    features = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])  # a grid of 2 × 2
    box = torch.tensor([[[0.25, 0.0, 1.0, 0.5], [0.0, 0.0, 0.5, 0.75]]])
    assert_same(pool_regions(features, box), torch.tensor([[[(1 + 2 * 2) / 3], [(2 * 1 + 3) / 3]]]))


def test_locations_of_vilbert_and_uniter():
    assert_same(location(BOXES, sides=False)[0, 0], torch.tensor([0, 0.25, 0.5, 1, 0.375]))
    assert_same(location(BOXES, sides=True)[0, 0], torch.tensor([0, 0.25, 0.5, 1, 0.5, 0.75, 0.375]))


def test_visualbert_adds_type_one_and_a_position():
    x = torch.randn(1, 2, 5)
    for in_order, places in ((False, [0, 0]), (True, [0, 1])):
        regions = VisualBERTRegions(5, 8, positions=6, types=2, in_order=in_order)
        expected = regions.projection(x) + regions.position_embedding.weight[places] + regions.type_embedding.weight[1]
        assert_same(regions(x, BOXES), expected)


def test_uniter_normalises_what_is_there_and_where_and_the_sum():
    x, regions = torch.randn(1, 2, 5), UNITERRegions(5, 8, norm_eps=1e-5)
    torch.nn.init.normal_(regions.type_embedding)
    norm = lambda t: torch.nn.functional.layer_norm(t, (8,))
    where = regions.location(location(BOXES, sides=True))
    assert_same(regions(x, BOXES), norm(norm(regions.projection(x)) + norm(where) + regions.type_embedding))


def test_vilbert_normalises_the_sum():
    x, regions = torch.randn(1, 2, 5), ViLBERTRegions(5, 8, norm_eps=1e-5)
    total = regions.projection(x) + regions.location(location(BOXES, sides=False))
    assert_same(regions(x, BOXES), torch.nn.functional.layer_norm(total, (8,)))
