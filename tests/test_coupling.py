"""Which channels of small models go together: right where they are offered, refused by name elsewhere."""

import pytest
import torch
from torch import nn

import lnprune
from lnprune.removal.cutting import cuts_of, settings_for, without, zeroed
from lnprune.removal.operations import RULES, listed
from tests.small_models import CASES, Case, Net


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def random_cuts(groups, seed=0):
    """Half of the channels of each group, at random."""
    generator, cuts = torch.Generator().manual_seed(seed), []
    for group in groups:
        flags = torch.zeros(group.channels, dtype=torch.bool)
        flags[torch.randperm(group.channels, generator=generator)[: group.channels // 2]] = True
        cuts += cuts_of(group, flags)
    return cuts


def first(output):
    return output if isinstance(output, torch.Tensor) else first(next(iter(output)))


def randomised(model):
    for tensor in tensors_of(model).values():
        if tensor.is_floating_point():
            tensor.data.uniform_(0.3, 1.0)
            if tensor.dim() > 1:
                tensor.data.mul_(torch.randint(2, tensor.shape) * 2 - 1)
    return model


def difference(model, groups, inputs, seed=0):
    """Between the model without half of its channels and with zeros there, over the largest output."""
    tensors, cuts = tensors_of(model), random_cuts(groups, seed)
    settings = settings_for(model, groups, [group.channels // 2 for group in groups])
    with torch.no_grad():
        small = first(without(model, tensors, cuts, settings)(*inputs))
        want = first(zeroed(model, tensors, cuts)(*inputs))
        if not torch.isfinite(want).all():  # 0 / 0, as of a norm of zeros
            reads = {(m.name, m.dim) for group in groups for m in group.members if m.is_input}
            want = first(zeroed(model, tensors, [cut for cut in cuts if cut[:2] in reads])(*inputs))
    assert small.shape == want.shape
    assert want.abs().max() > 0
    return float((small - want).abs().max() / want.abs().max())


def coupled(case: Case, check: bool):
    torch.manual_seed(0)
    model = randomised(case.make().double().eval())
    inputs = (torch.randn(case.shape, dtype=torch.float64),)
    return model, inputs, lnprune.couple(model, inputs, check=check)


def state(model):
    """All of a model that a run could change."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "order": [name for name, _ in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "of tensors": [sorted(vars(tensor)) for tensor in tensors_of(model).values()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
        ],
        "identities": [id(tensor) for tensor in tensors_of(model).values()],
        "random": torch.get_rng_state(),
    }


def assert_same_state(before, after):
    for key, value in before.items():
        if key == "state":
            assert value.keys() == after[key].keys()
            assert all(torch.equal(value[name], after[key][name]) for name in value)
        elif key == "random":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_found_by_trying])
def test_labels_alone_offer_what_can_go_and_refuse_the_rest_by_name(name):
    case = CASES[name]
    model, inputs, coupling = coupled(case, check=False)
    assert sum(group.channels for group in coupling.groups) == case.channels, str(coupling)
    if case.reason is not None:
        assert any(case.reason in refused.reason for refused in coupling.refused), str(coupling)
    if coupling.groups:
        for seed in range(3):
            assert difference(model, coupling.groups, inputs, seed) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_what_is_offered_after_the_trial_can_go(name):
    case = CASES[name]
    model, inputs, coupling = coupled(case, check=True)
    assert sum(group.channels for group in coupling.groups) == case.channels, str(coupling)
    if case.reason is not None:
        assert any(case.reason in refused.reason for refused in coupling.refused), str(coupling)
    if coupling.groups and case.is_found_by_trying:
        for seed in range(20):
            assert difference(model, coupling.groups, inputs, seed) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_as_it_was(name):
    torch.manual_seed(0)
    model, inputs = CASES[name].make(), torch.randn(CASES[name].shape)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    kept, before = inputs.clone(), state(model)
    lnprune.couple(model, inputs)
    assert_same_state(before, state(model))
    assert torch.equal(kept, inputs)


def test_values_that_the_model_writes_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("mean", torch.zeros(4))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = x
            x = self.a(x)
            self.mean.lerp_(x.mean(0), 0.5)
            self.mean += 1
            self.register_buffer("new", x)
            return self.o(x - self.mean) + torch.rand(())

    model, inputs = Counting(), torch.randn(5, 3)
    before = state(model)
    coupling = lnprune.couple(model, inputs)
    assert_same_state(before, state(model))
    assert model.calls == 0
    assert [group.channels for group in coupling.groups] == [4]


def test_a_model_that_raises_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    inputs = torch.randn(2, 5)
    before = state(model)
    with pytest.raises(ValueError, match="example_inputs: Sequential raises on them: RuntimeError: mat1"):
        lnprune.couple(model, inputs)
    assert_same_state(before, state(model))


@torch.library.custom_op("lnprune_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda net, x: doubled(x),
            "goes through the operation lnprune_test::doubled, which lnprune does not",
        ),
        (lambda net, x: torch.linalg.solve(torch.eye(4), x), "_linalg_solve_ex"),
        (lambda net, x: torch.add(x, 1, out=torch.empty_like(x)), "add"),
        (lambda net, x: (torch._foreach_add_([x], 1), x)[1], "_foreach_add"),
    ],
)
def test_an_operation_that_is_not_known_pins_what_enters_it(function, reason):
    net = Net(lambda net, x: net.o(function(net, net.a(x))), a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    coupling = lnprune.couple(net, torch.randn(4, 6))
    assert coupling.groups == []
    found = [
        refused.reason
        for refused in coupling.refused
        if refused.parameter == "a.weight" and not refused.dim
    ]
    assert len(found) == 1
    assert reason in found[0]


def test_an_operand_that_no_rule_reads_is_pinned(monkeypatch):
    def forgetful(labels, out, x, weight):
        return list(labels.planes(x))

    monkeypatch.setitem(RULES, "_prelu_kernel", RULES["_prelu_kernel"]._replace(function=forgetful))
    net = Net(lambda net, x: net.o(net.p(net.a(x))), a=nn.Linear(6, 8), p=nn.PReLU(8), o=nn.Linear(8, 3))
    coupling = lnprune.couple(net, torch.randn(4, 6))
    (refused,) = [each for each in coupling.refused if each.parameter == "p.weight"]
    assert refused.reason == "is an operand of _prelu_kernel that lnprune does not follow in the PReLU `p`"


def test_a_rule_that_fails_pins_what_enters(monkeypatch):
    def failing(labels, out, x, *args):
        raise IndexError("a case that nobody thought of")

    monkeypatch.setitem(RULES, "flip", RULES["flip"]._replace(function=failing))
    model = CASES["flip"].make()
    coupling = lnprune.couple(model, torch.randn(CASES["flip"].shape))
    assert coupling.groups == []
    assert any("flip" in refused.reason for refused in coupling.refused)


@pytest.mark.parametrize("moved", [lambda p: p.unsqueeze(0), lambda p: p.expand(*p.shape[:1], 3)])
def test_planes_that_do_not_fit_pin(monkeypatch, moved):
    def wrong(labels, out, x, dims):
        return [moved(plane) for plane in labels.planes(x)]

    monkeypatch.setitem(RULES, "flip", RULES["flip"]._replace(function=wrong))
    net = Net(lambda net, x: net.o(net.a(x).flip(1)), a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    coupling = lnprune.couple(net, torch.randn(4, 6))
    assert coupling.groups == []


def test_a_parameter_that_the_run_never_saw_is_refused():
    net = Net(
        lambda net, x: net.o(net.a(x)),
        a=nn.Linear(6, 8),
        o=nn.Linear(8, 3),
        unused=nn.Linear(8, 8, bias=False),
    )
    coupling = lnprune.couple(net, torch.randn(4, 6))
    assert [group.name for group in coupling.groups] == ["a.weight"]
    unused = {(each.dim, each.reason) for each in coupling.refused if each.module == "unused"}
    assert unused == {(0, "is not used in this run"), (1, "is not used in this run")}


def test_channels_that_one_slot_alone_has_are_refused():
    net = Net(lambda net, x: (net.a(x), net.b(x))[0], a=nn.Linear(6, 8), b=nn.Linear(6, 5, bias=False))
    coupling = lnprune.couple(net, torch.randn(4, 6))
    assert coupling.groups == []
    assert any(r.parameter == "b.weight" and "nothing was found" in r.reason for r in coupling.refused)


def test_frozen_layers_and_tied_weights():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    net = Net(lambda net, x: net.o(net.e(x) + net.b(net.e(x))), e=embedding, b=nn.Linear(8, 8), o=head)
    net.double().eval().requires_grad_(False)
    inputs = torch.arange(10)
    coupling = lnprune.couple(net, inputs)
    assert [group.channels for group in coupling.groups] == [8]
    assert difference(net, coupling.groups, (inputs,)) < 1e-12
    small = without(net, tensors_of(net), random_cuts(coupling.groups))
    assert small.e.weight is small.o.weight
    assert not small.e.weight.requires_grad


def test_tensors_in_one_memory_are_refused():
    net = Net(lambda net, x: net.o(net.a(x)), a=nn.Linear(8, 8), o=nn.Linear(8, 8))
    net.o.weight = nn.Parameter(net.a.weight.data)
    coupling = lnprune.couple(net, torch.randn(2, 8))
    assert coupling.groups == []
    assert any("in the same memory" in refused.reason for refused in coupling.refused)


def test_masks_and_parametrizations_are_refused_and_the_rest_is_not():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    lnprune.ln_structured(model[0], "weight", 0.5, 2, 0)
    nn.utils.parametrizations.spectral_norm(model[2])
    coupling = lnprune.couple(model, torch.randn(2, 6))
    assert [group.name for group in coupling.groups] == ["3.weight"]
    reasons = {refused.reason for refused in coupling.refused}
    assert "has a mask in `0`: remove it first, as remove_all() does" in reasons
    assert "is parametrized in `2`: remove_parametrizations() first" in reasons


def residual():
    """Three groups: the stream of two layers, and one inside of each block."""

    def forward(net, x):
        x = net.a(x)
        x = x + net.c(net.b(x).relu())
        return net.o(x + net.e(net.d(x).relu()))

    sizes = {"a": (3, 8), "b": (8, 4), "c": (4, 8), "d": (8, 6), "e": (6, 8), "o": (8, 2)}
    return Net(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})


def test_groups_of_a_residual_network():
    groups = lnprune.couple(residual(), torch.randn(2, 3)).groups
    assert [(group.name, group.channels) for group in groups] == [
        ("a.weight", 8),
        ("b.weight", 4),
        ("d.weight", 6),
    ]
    stream = {(member.name, member.dim): member.is_input for member in groups[0].members}
    makers = {
        ("a.weight", 0),
        ("a.bias", 0),
        ("c.weight", 0),
        ("c.bias", 0),
        ("e.weight", 0),
        ("e.bias", 0),
    }
    readers = {("b.weight", 1), ("d.weight", 1), ("o.weight", 1)}
    assert stream == dict.fromkeys(makers, False) | dict.fromkeys(readers, True)
    assert all(
        member.slices.tolist() == member.channels.tolist() == list(range(8)) for member in groups[0].members
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "b"}, ["b.weight"]),
        ({"include": ["[bd]*"]}, ["b.weight", "d.weight"]),
        ({"include": nn.Linear, "exclude": "c.weight"}, ["b.weight", "d.weight"]),
        ({"exclude": ["a", "b"]}, ["d.weight"]),
    ],
)
def test_include_and_exclude(options, names):
    coupling = lnprune.couple(residual(), torch.randn(2, 3), **options)
    assert [group.name for group in coupling.groups] == names
    reasons = {refused.reason for refused in coupling.refused if refused.parameter == "a.weight"}
    assert any("is not included" in reason or "is excluded" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "o"}, "include: the channels of o.weight cannot go: is part of the model's output"),
        ({"include": ["b", "z"]}, "include: 'z' matches nothing"),
        ({"exclude": nn.Conv2d}, "exclude: 'Conv2d' matches nothing"),
    ],
)
def test_what_include_and_exclude_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        lnprune.couple(residual(), torch.randn(2, 3), **options)


class Opaque:
    __slots__ = ()


@pytest.mark.parametrize(
    ("model", "inputs", "kind", "message"),
    [
        (torch.randn(3), torch.randn(3), TypeError, "model: expected a module, got a Tensor"),
        (nn.ReLU(), torch.randn(3), ValueError, "model: ReLU has no parameters"),
        (nn.Linear(2, 2, device="meta"), torch.randn(3), ValueError, "weight: is on the device meta"),
        (nn.LazyLinear(2), torch.randn(3), ValueError, "weight: expected a parameter with a shape"),
        (
            nn.Linear(2, 2),
            3,
            TypeError,
            "example_inputs: expected a tensor, a tuple of arguments or a dict",
        ),
        (nn.Linear(2, 2), {"x": torch.randn(2)}, ValueError, "Linear raises on them: TypeError: .*'x'"),
        (
            Net(lambda net, x: None, a=nn.Linear(2, 2)),
            torch.randn(2),
            TypeError,
            "returned a NoneType, in which",
        ),
        (
            Net(lambda net, x: Opaque(), a=nn.Linear(2, 2)),
            torch.randn(2),
            TypeError,
            "returned a Opaque, in whi",
        ),
        (torch.jit.trace(nn.Linear(2, 2), torch.randn(2)), torch.randn(2), RuntimeError, "it is scripted"),
        (torch.compile(nn.Linear(2, 2)), torch.randn(2), TypeError, "before it is compiled or wrapped"),
    ],
)
def test_bad_input_is_one_sentence(model, inputs, kind, message):
    with pytest.raises(kind, match=message) as caught:
        lnprune.couple(model, inputs)
    assert "\n" not in str(caught.value)


def test_outputs_are_found_in_any_object():
    class Output:
        def __init__(self, logits):
            self.inside = {"logits": [logits]}

    net = Net(lambda net, x: Output(net.o(net.a(x))), a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    assert [group.name for group in lnprune.couple(net, torch.randn(4, 6)).groups] == ["a.weight"]


def test_keywords_and_tuples_are_example_inputs():
    net = Net(lambda net, x, scale: net.o(net.a(x) * scale), a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    x = torch.randn(4, 6)
    for inputs in ((x, 2.0), [x, 2.0], {"x": x, "scale": 2.0}):
        assert [group.channels for group in lnprune.couple(net, inputs).groups] == [8]


def test_the_list_of_a_coupling():
    text = str(lnprune.couple(residual(), torch.randn(2, 3)))
    assert text.splitlines()[0] == "Coupling(Net, 3 groups, 18 channels)"
    assert "  a.weight: 8 channels\n" in text
    assert "    read by  b.weight[1], d.weight[1], o.weight[1]\n" in text
    assert "  o.weight[0], o.bias[0]: is part of the model's output" in text


def test_every_rule_is_listed_once():
    names = [name for line in listed().splitlines()[2:] for name in line.split("|")[1].split(", ")]
    assert sorted(name.strip(" `") for name in names) == sorted(RULES)


class Heads(nn.Module):
    """An attention that keeps sizes in attributes, as most do."""

    def __init__(self, size=12, heads=4):
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_size = heads, size // heads, (size, size)
        self.qkv, self.o = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.mT) / self.head_dim**0.5).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, n, self.all_head_size[1]))


def test_attributes_that_hold_sizes_are_found_by_trying():
    model = nn.Sequential(nn.Linear(5, 12), Heads(), nn.ReLU(), Heads(), nn.Linear(12, 3)).double().eval()
    inputs = torch.randn(2, 7, 5, dtype=torch.float64)
    coupling = lnprune.couple(model, inputs)
    heads = [group for group in coupling.groups if group.attributes]
    assert [group.name for group in heads] == ["1.qkv.weight", "3.qkv.weight"]
    assert {(each.name, each.position, each.per_channel) for each in heads[0].attributes} >= {
        ("num_heads", None, 1),
        ("all_head_size", 1, 3),
    }
    assert "1.num_heads" in str(coupling)
    for seed in range(5):
        assert difference(model, coupling.groups, (inputs,), seed) < 1e-12
    assert (model[1].num_heads, model[1].all_head_size) == (4, (12, 12))


def test_the_trial_is_not_blind_behind_zeros():
    torch.manual_seed(0)
    case = CASES["every second channel"]
    model = case.make()
    nn.init.zeros_(model.o.weight)
    assert lnprune.couple(model, torch.randn(case.shape)).groups == []
    case = CASES["roll"]
    model = case.make()
    nn.init.zeros_(model.o.weight)
    assert lnprune.couple(model, torch.randn(case.shape)).groups == []
    assert lnprune.couple(model, torch.randn(case.shape), check=False).groups != []


class Growing(nn.Module):
    """Where weights are large, so are its values, or so is what a difference like rounding grows to."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(12, 12) for _ in range(3)) for _ in range(24))
        self.o = nn.Linear(12, 3)

    def forward(self, x):
        for f, g, h in self.blocks:
            rounding = 1 + 1e-15 * x.shape[1]
            x = x + h(f(x) * g(x)) if self.kind == "products" else h(torch.sin(20 * rounding * f(x)))
        return self.o(x)


@pytest.mark.parametrize("kind", ["products", "sines"])
def test_the_trial_is_not_misled_by_values_or_rounding_that_grow(kind):
    torch.manual_seed(0)
    coupling = lnprune.couple(Growing(kind), torch.randn(16, 12))
    assert not [each for each in coupling.refused if "size" in each.reason], str(coupling)
    assert len(coupling.groups) >= 24


def test_what_there_is_no_time_to_try_is_refused():
    case = CASES["view of a number"]
    coupling = lnprune.couple(case.make(), torch.randn(case.shape), check=1e-9)
    assert coupling.groups == []
    reason = "was not tried within 1e-09 seconds: give check= more of them"
    assert any(refused.reason == reason for refused in coupling.refused)


@pytest.mark.parametrize("check", [0, -1.0, "yes", None, float("nan")])
def test_check_is_a_flag_or_seconds(check):
    with pytest.raises(ValueError, match="check: expected True, False or seconds, more than 0, got"):
        lnprune.couple(nn.Linear(2, 2), torch.randn(2), check=check)


def test_one_group_that_fails_is_found_among_many():
    def forward(net, x):
        x = net.l0(x)
        for i in range(1, 9):
            x = net.get_submodule(f"l{i}")(x.relu())
            if i == 5:
                x = x / x.shape[1]
        return x

    net = Net(forward, **{f"l{i}": nn.Linear(8, 8) for i in range(9)})
    coupling = lnprune.couple(net, torch.randn(4, 8))
    assert [group.name for group in coupling.groups] == [f"l{i}.weight" for i in (0, 1, 2, 3, 4, 6, 7)]
    (refused,) = [each for each in coupling.refused if each.parameter == "l5.weight" and each.dim == 0]
    assert refused.reason.startswith("its size is written in the code: the outputs differ, by ")


def test_a_size_in_the_code_is_refused_with_its_view():
    case = CASES["view over fewer"]
    coupling = lnprune.couple(case.make(), torch.randn(case.shape))
    reason = next(each.reason for each in coupling.refused if each.parameter == "a.bias")
    start = "its size is written in the code, in `view(4, 8)` to `(4, 2, 4)` in the model's Net: "
    assert reason.startswith(start)


def test_a_size_setter_teaches_a_type():
    class Scale(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.sizes = {"all": size}
            self.weight = nn.Parameter(torch.rand(size))

        def forward(self, x):
            return x.view(-1, self.sizes["all"]) * self.weight

    model = nn.Sequential(nn.Linear(6, 8), Scale(8), nn.Linear(8, 3))
    assert lnprune.couple(model, torch.randn(2, 6)).groups == []

    @lnprune.size_setter(Scale)
    def set_sizes(module, shapes):
        assert shapes == {"weight": (8,)}
        module.sizes = {"all": len(module.weight)}

    assert [group.channels for group in lnprune.couple(model, torch.randn(2, 6)).groups] == [8]
    assert model[1].sizes == {"all": 8}
