from torch import nn

from megatron.training.param_groups import build_param_groups


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    decaying, free = build_param_groups(model.named_parameters())
    assert decaying["params"] == [model[0].weight, model[1].weight]
    assert free["params"] == [model[1].bias, model[2].weight, model[2].bias]
    assert (decaying["wd_mult"], free["wd_mult"]) == (1.0, 0.0)
    assert decaying["lr_mult"] == free["lr_mult"] == 1.0


def test_a_group_without_parameters_is_left_out():
    assert len(build_param_groups(nn.Linear(3, 3, bias=False).named_parameters())) == 1


def test_frozen_parameters_are_left_out():
    assert build_param_groups(nn.Linear(3, 3).requires_grad_(False).named_parameters()) == []
