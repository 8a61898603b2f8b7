"""The adapters against Hugging Face PEFT in float32: files both ways, logits, gradients, three AdamW steps, DoRA with dropout."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import talan  # noqa: E402
from model import load_model  # noqa: E402
from talan import AdapterConfig, AdapterLinear, TalanConfig, attach, load_adapter, merge_adapter, save_adapter  # noqa: E402

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.lora_bias=True")

KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}
FAMILIES = ("qwen3", "llama")
TARGETS = (("q_proj", "v_proj"), talan.TARGETS)
TOKENS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
pairs = pytest.mark.parametrize("family, kind", [(f, k) for f in FAMILIES for k in KINDS])


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)


def our_logits(model):
    return model.logits(model(TOKENS))


def loss(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def agree(ours, theirs, tol=1e-5):
    assert (ours - theirs).abs().max() <= tol * theirs.abs().max()


def our_name(name):
    """PEFT's parameter name -> ours."""
    return name.removeprefix("base_model.model.").replace(".default", "").replace("_vector.weight", "_vector").replace(
        "lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B").replace(".base_layer", "")


def their_adapter(model):
    return {our_name(n): p for n, p in model.named_parameters() if ".lora_" in n}


def peft_model(folder, kind, targets, dropout=0.0, **fields):
    """A PEFT model whose every adapter tensor has moved away from its start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=7, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **KINDS[kind], **fields)
    model = peft.get_peft_model(reference(folder), config)
    for i, p in enumerate(their_adapter(model).values()):
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model.eval()


def trained(folder, kind, targets=talan.TARGETS, steps=3, talan_config=None):
    """Ours after a few steps, so that no B is zero and no magnitude at its start."""
    model = load_model(folder, dtype=torch.float32)
    trainable = attach(model, AdapterConfig(kind, 4, 7.0, targets=targets), talan_config)
    optimizer = torch.optim.AdamW(trainable, lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(our_logits(model)).backward()
        optimizer.step()
    return model


def effective_scale(model):
    """s of every adapted projection, in either library."""
    if isinstance(model, peft.PeftModel):
        return {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", 0), dict) and m.scaling}
    return {m.scale for m in model.modules() if isinstance(m, AdapterLinear)}


# ------------------------------------------------------------------------------------------ files
@pairs
@pytest.mark.parametrize("targets", TARGETS, ids=["subset", "all"])
def test_peft_loads_our_folder(tiny_checkpoint, family, kind, targets, tmp_path):
    folder = tiny_checkpoint(family)
    model = trained(folder, kind, targets)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")  # PEFT only warns about tensors it did not find
        theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path).eval()
    with torch.no_grad():
        out = theirs(TOKENS).logits
        agree(our_logits(model), out)
        assert (out - reference(folder)(TOKENS).logits).abs().max() > 1e-2
        agree(theirs.merge_and_unload()(TOKENS).logits, out)
        merge_adapter(model)
        agree(our_logits(model), out)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (4, 7, kind == "rslora", kind == "dora")


@pairs
@pytest.mark.parametrize("targets", [*TARGETS, "all-linear", r".*\.(q_proj|down_proj)"], ids=["subset", "all", "all-linear", "pattern"])
def test_we_load_pefts_folder(tiny_checkpoint, family, kind, targets, tmp_path):
    folder = tiny_checkpoint(family)
    theirs = peft_model(folder, kind, targets if isinstance(targets, str) else list(targets))
    theirs.save_pretrained(tmp_path)
    model = load_model(folder)
    load_adapter(model, tmp_path)
    want = their_adapter(theirs)
    found = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)
    with torch.no_grad():
        agree(our_logits(model), theirs(TOKENS).logits)


@pytest.mark.parametrize("kind, s", [("lora", 7 / 4), ("rslora", 7 / 2), ("dora", 7 / 4)])
def test_effective_scale_after_reload(tiny_checkpoint, kind, s, tmp_path):
    """trap 14: rsLoRA or alpha lost on export."""
    folder = tiny_checkpoint("qwen3")
    save_adapter(trained(folder, kind), tmp_path / "ours")
    theirs = peft_model(folder, kind, list(talan.TARGETS))
    theirs.save_pretrained(tmp_path / "theirs")
    for place in ("ours", "theirs"):
        again = load_model(folder)
        load_adapter(again, tmp_path / place)
        assert effective_scale(again) == {s}
        assert effective_scale(peft.PeftModel.from_pretrained(reference(folder), tmp_path / place)) == {s}
        raw = json.loads((tmp_path / place / "adapter_config.json").read_text())
        assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["use_dora"]) == (4, 7, kind == "rslora", kind == "dora")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_survives_the_way_to_peft_and_back(tiny_checkpoint, kind, tmp_path):
    folder = tiny_checkpoint("qwen3")
    model = trained(folder, kind)
    save_adapter(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(reference(folder), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype == torch.float32 for k in one)
    again = load_model(folder)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(our_logits(again), our_logits(model))


def test_a_side_path_does_not_disturb_peft(tiny_checkpoint, tmp_path):
    """The side path is in its own file: PEFT loads the adapter beside it and gives our logits without the path."""
    folder = tiny_checkpoint("llama")
    model = trained(folder, "lora", talan_config=TalanConfig((1,), slots=3, width=4))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path).eval()
    with torch.no_grad():
        assert (our_logits(model) - theirs(TOKENS).logits).abs().max() > 1e-3
        model.model.layers[1].side_path = None
        agree(our_logits(model), theirs(TOKENS).logits)


# ------------------------------------------------------------------------------------------ training
@pairs
def test_gradients_and_three_adamw_steps_agree(tiny_checkpoint, family, kind, tmp_path):
    folder = tiny_checkpoint(family)
    theirs = peft_model(folder, kind, list(talan.TARGETS)).train()
    theirs.save_pretrained(tmp_path)
    model = load_model(folder)
    trainable = load_adapter(model.train(), tmp_path)
    want, found = their_adapter(theirs), {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == want.keys() == {our_name(n) for n, p in theirs.named_parameters() if p.requires_grad}
    optimizers = [torch.optim.AdamW(ps, lr=1e-3, eps=1e-4) for ps in (trainable, [p for p in theirs.parameters() if p.requires_grad])]
    for step in range(3):
        for optimizer, logits in zip(optimizers, (our_logits(model), theirs(TOKENS).logits)):
            optimizer.zero_grad()
            loss(logits).backward()
        for name, p in want.items():
            assert p.grad.abs().max() > 1e-6, name
            assert (found[name].grad - p.grad).abs().max() <= 2e-4 * p.grad.abs().max(), f"{name}, step {step}"
        [optimizer.step() for optimizer in optimizers]
    start = load_file(tmp_path / "adapter_model.safetensors")
    for name, p in want.items():
        moved = (p - start[talan.peft_name(name)]).abs().max()
        assert moved > 1e-3 and (found[name] - p).abs().max() <= 2e-2 * moved, name
    with torch.no_grad():
        agree(our_logits(model.eval()), theirs.eval()(TOKENS).logits, 1e-4)


def mask_by_shape(x, p=0.5, training=True, inplace=False):
    """A dropout whose mask depends on the shape alone, so that both libraries draw the same one."""
    if not training or p == 0:
        return x
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(sum(x.shape))) >= p
    return x * kept / (1 - p)


@pairs
def test_dropout_as_in_peft(tiny_checkpoint, family, kind, tmp_path, monkeypatch):
    """trap 9: with dropout d, DoRA is W x + (g-1) W d(x) + g s B A d(x), forward and backward."""
    folder = tiny_checkpoint(family)
    theirs = peft_model(folder, kind, list(talan.TARGETS), dropout=0.3)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder)
    load_adapter(model, tmp_path)
    assert model.adapter_config.dropout == 0.3
    with torch.no_grad():
        plain = our_logits(model)
        agree(plain, theirs(TOKENS).logits)
    monkeypatch.setattr(F, "dropout", mask_by_shape)  # nn.Dropout (PEFT) and talan.py both call it there
    ours, wanted = our_logits(model.train()), theirs.train()(TOKENS).logits
    agree(ours, wanted, 2e-5)
    assert (ours - plain).abs().max() > 1e-2
    loss(ours).backward()
    loss(wanted).backward()
    found = dict(model.named_parameters())
    for name, p in their_adapter(theirs).items():
        assert p.grad.abs().max() > 1e-6 and (found[name].grad - p.grad).abs().max() <= 2e-4 * p.grad.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_pefts(tiny_checkpoint, kind):
    """B = 0, m = ||W||, and A uniform within the same bounds."""
    folder, model = tiny_checkpoint("qwen3"), load_model(tiny_checkpoint("qwen3"))
    attach(model, AdapterConfig(kind, 4, 7.0))
    theirs = peft.get_peft_model(reference(folder), peft.LoraConfig(r=4, lora_alpha=7, target_modules=list(talan.TARGETS), **KINDS[kind]))
    found = dict(model.named_parameters())
    for name, p in their_adapter(theirs).items():
        if name.endswith("lora_A"):
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound and found[name].abs().max() <= bound
            assert found[name].std().item() == pytest.approx(p.std().item(), rel=0.2)
        else:
            torch.testing.assert_close(found[name], p, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------ what is not supported
UNSUPPORTED = {
    "bias": dict(bias="all"), "modules_to_save": dict(modules_to_save=["lm_head"]), "rank_pattern": dict(rank_pattern={"q_proj": 2}),
    "alpha_pattern": dict(alpha_pattern={"q_proj": 3}), "layers_to_transform": dict(layers_to_transform=[0]),
    "init_lora_weights": dict(init_lora_weights="pissa"), "exclude_modules": dict(exclude_modules=["v_proj"]),
    "lora_bias": dict(lora_bias=True), "trainable_token_indices": dict(trainable_token_indices=[1, 2]),
    "use_dora and use_rslora": dict(use_dora=True, use_rslora=True), "target_modules|targets": dict(target_modules=["q_proj", "embed_tokens"]),
    "layer_replication": dict(layer_replication=[(0, 3), (1, 3)]),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_peft_setting_is_refused_by_name(tiny_checkpoint, name, tmp_path):
    folder = tiny_checkpoint("llama")
    base = reference(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(**{**dict(r=4, target_modules=["q_proj", "v_proj"]), **UNSUPPORTED[name]}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    bare = load_model(folder)
    before = {n: p.clone() for n, p in bare.named_parameters()}
    with pytest.raises(ValueError, match=name):
        load_adapter(bare, tmp_path)
    assert before.keys() == dict(bare.named_parameters()).keys() and all(torch.equal(before[n], p) for n, p in bare.named_parameters())


@pytest.mark.parametrize("name, value", [
    ("fan_in_fan_out", True), ("peft_type", "LOHA"), ("bias", "lora_only"), ("use_qalora", True), ("arrow_config", {"top_k": 3}),
    ("megatron_config", {"a": 1}), ("corda_config", {"x": 1}), ("target_parameters", ["q_proj.weight"]), ("a_field_of_tomorrow", 3)])
def test_unsupported_peft_field_is_refused_by_name(tiny_checkpoint, name, value, tmp_path):
    """Fields that PEFT does not let us save on this model, written into the file."""
    folder = tiny_checkpoint("llama")
    peft_model(folder, "lora", ["q_proj"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    load_adapter(load_model(folder), tmp_path)  # as PEFT wrote it, it loads
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {name: value}))
    with pytest.raises(ValueError, match=name):
        load_adapter(load_model(folder), tmp_path)


def test_all_unsupported_settings_are_listed(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama")
    peft_model(folder, "lora", ["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all", "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ValueError) as error:
        load_adapter(load_model(folder), tmp_path)
    assert all(name in str(error.value) for name in ("bias", "modules_to_save", "rank_pattern"))


def test_adapter_on_a_tied_embedding_or_lm_head_is_refused(tiny_checkpoint, tmp_path):
    """trap 11: merging into a tied matrix would change the embedding and the output at once."""
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    for target in ("lm_head", "embed_tokens"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=4, target_modules=["q_proj", target])
            peft.get_peft_model(reference(folder), config).save_pretrained(tmp_path / target, save_embedding_layers=False)
        with pytest.raises(ValueError, match=target):
            load_adapter(load_model(folder), tmp_path / target)


def test_an_adapter_for_some_layers_only_is_refused(tiny_checkpoint, tmp_path):
    """target_modules by full path: the tensors of the other layers are missing, and each is named."""
    folder = tiny_checkpoint("llama")
    peft_model(folder, "lora", ["model.layers.1.self_attn.q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.layers.1.self_attn.q_proj|missing.*layers.0.self_attn.q_proj"):
        load_adapter(load_model(folder), tmp_path)
    peft_model(folder, "lora", r".*layers\.[01]\.self_attn\.q_proj").save_pretrained(tmp_path / "pattern")
    with pytest.raises(ValueError, match="missing: base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"):
        load_adapter(load_model(folder), tmp_path / "pattern")


def test_an_extra_tensor_that_peft_would_drop_is_refused(tiny_checkpoint, tmp_path):
    """trap 14: PEFT loads with strict=False."""
    folder = tiny_checkpoint("llama")
    peft_model(folder, "lora", ["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.layers.0.side_path.w_out": torch.zeros(3)}, file)
    peft.PeftModel.from_pretrained(reference(folder), tmp_path)
    with pytest.raises(ValueError, match="unexpected: base_model.model.model.layers.0.side_path.w_out"):
        load_adapter(load_model(folder), tmp_path)
