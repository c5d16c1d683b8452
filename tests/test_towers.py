import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from retriever.checkpoints import bert_shape, load_backbone, load_bert, load_tensors
from retriever.errors import EncoderError
from retriever.towers import (
    BackboneTower,
    Dropout,
    DualEncoder,
    GRUTower,
    StaticTower,
    TransformerTower,
    fold_batch_norms,
)

# float32 sums in another order: a few units in the last place of activations near 1.
CLOSE = 1e-5


def randomise(module: nn.Module) -> None:
    """Weights and BatchNorm statistics that hide no mistake, unlike the initial zeros and ones."""
    torch.manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.05)


@pytest.fixture(scope="module")
def backbone():
    import timm

    model = timm.create_model("tf_efficientnet_lite0").eval()
    randomise(model)
    return model


def test_folded_backbone_equals_the_one_with_batch_norms(backbone):
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = backbone.forward_features(pixels)
    import copy

    folded = copy.deepcopy(backbone)
    fold_batch_norms(folded)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded.forward_features(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_backbone_weights_under_other_names_are_matched_in_order(backbone, tmp_path):
    state = {f"x{i}": t.clone() for i, t in enumerate(backbone.state_dict().values())}
    torch.save(state, tmp_path / "w.pth")
    tower = BackboneTower("tf_efficientnet_lite0")
    load_backbone(tower, "tf_efficientnet_lite0", str(tmp_path / "w.pth"))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = backbone.forward_features(pixels).mean(dim=(2, 3))
        torch.testing.assert_close(tower(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "w.safetensors")
    tower = BackboneTower("tf_efficientnet_lite0")
    with pytest.raises(EncoderError, match=r"w\.safetensors: these are not the weights"):
        load_backbone(tower, "tf_efficientnet_lite0", str(tmp_path / "w.safetensors"))


def bert_weights(width=32, layers=2, hidden=64, vocabulary=50, positions=16):
    torch.manual_seed(1)
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, width),
        "embeddings.position_embeddings.weight": (positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes[f"{layer}attention.self.{name}.weight"] = (width, width)
            shapes[f"{layer}attention.self.{name}.bias"] = (width,)
        for name, out, inner in (
            ("attention.output.dense", width, width),
            ("intermediate.dense", hidden, width),
            ("output.dense", width, hidden),
        ):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (out, inner), (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (width,)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def test_transformer_equals_torchs_own_layers_with_the_weights_of_bert(tmp_path):
    weights = bert_weights()
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    shape = bert_shape(path) | {"heads": 4}
    assert shape == {"vocabulary": 50, "width": 32, "layers": 2, "hidden": 64, "heads": 4}
    tower = TransformerTower(50, 8, 32, 2, 4, 64).eval()
    load_bert(tower, path, weights["embeddings.word_embeddings.weight"])

    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    states = weights["embeddings.word_embeddings.weight"][ids]
    states = states + weights["embeddings.position_embeddings.weight"][:4]
    states = states + weights["embeddings.token_type_embeddings.weight"][0]
    norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
    states = nn.functional.layer_norm(states, (32,), *norm, eps=1e-12)
    for i in range(2):
        names = {k.removeprefix(f"encoder.layer.{i}."): v for k, v in weights.items()}
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, activation="gelu", batch_first=True, layer_norm_eps=1e-12
        ).eval()
        qkv = [f"attention.self.{n}" for n in ("query", "key", "value")]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([names[f"{n}.weight"] for n in qkv]),
                "self_attn.in_proj_bias": torch.cat([names[f"{n}.bias"] for n in qkv]),
            }
            | {
                f"{theirs}.{part}": names[f"{bert}.{part}"]
                for theirs, bert in (
                    ("self_attn.out_proj", "attention.output.dense"),
                    ("norm1", "attention.output.LayerNorm"),
                    ("linear1", "intermediate.dense"),
                    ("linear2", "output.dense"),
                    ("norm2", "output.LayerNorm"),
                )
                for part in ("weight", "bias")
            }
        )
        # Gradients on: otherwise torch takes a fused path with other rounding.
        states = layer(states, src_key_padding_mask=mask == 0)
    wanted = torch.stack([states[0].mean(dim=0), states[1, :2].mean(dim=0)])
    torch.testing.assert_close(tower(ids, mask), wanted, rtol=CLOSE, atol=CLOSE)


def test_a_bert_with_too_few_positions_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(bert_weights(positions=4), path)
    with pytest.raises(EncoderError, match="positions for 4 tokens only"):
        load_bert(TransformerTower(50, 8, 32, 2, 4, 64), path, torch.zeros(50, 32))


@pytest.mark.parametrize(
    "tower", [TransformerTower(50, 8, 32, 1, 4, 64), StaticTower(50, 32), GRUTower(50, 32)]
)
def test_padding_changes_no_text(tower):
    randomise(tower)
    tower.eval()
    short = tower(torch.tensor([[3, 4]]), torch.tensor([[1, 1]]))
    padded = tower(
        torch.tensor([[3, 4, 0, 0], [1, 2, 3, 4]]), torch.tensor([[1, 1, 0, 0], [1] * 4])
    )
    torch.testing.assert_close(padded[:1], short, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    "tower", [TransformerTower(50, 8, 32, 1, 4, 64), StaticTower(50, 32), GRUTower(50, 32)]
)
def test_a_hidden_token_does_not_matter_and_those_behind_it_do(tower):
    randomise(tower)
    tower.eval()
    mask = torch.tensor([[1, 0, 0, 1]])
    first = tower(torch.tensor([[1, 2, 3, 4]]), mask)
    torch.testing.assert_close(tower(torch.tensor([[1, 8, 9, 4]]), mask), first)
    assert not torch.allclose(tower(torch.tensor([[1, 2, 3, 7]]), mask), first, atol=1e-3)


def test_batch_norms_that_cannot_be_folded_stay_frozen():
    tower = BackboneTower("densenet121").train()
    norms = [layer for layer in tower.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_a_file_with_other_things_than_tensors_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="other things than tensors"):
        load_tensors(tmp_path / "w.pth")


def test_dual_encoder_gives_unit_rows_and_bounds_the_logit_scale():
    side = {"tower": "cnn", "size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "width": 8}
    text = {"tower": "gru", "vocabulary": 50, "width": 16, "max_tokens": 8}
    model = DualEncoder({"dim": 12, "image": side, "text": text}).eval()
    pixels = torch.randint(0, 255, (3, 16, 16, 3), dtype=torch.uint8)
    images = model.encode_images(pixels)
    texts = model.encode_texts(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    assert images.shape == (3, 12)
    assert texts.shape == (1, 12)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3), rtol=CLOSE, atol=CLOSE)
    model.log_scale.data.fill_(10.0)
    assert model.logit_scale.item() == 100


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    ones = torch.ones(1000, 1001, requires_grad=True)
    torch.manual_seed(0)
    dropped = Dropout(0.3)(ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.002)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped)  # gradients pass where values did
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.3)(ones), dropped)
    assert torch.equal(Dropout(0.3).eval()(ones), ones)
    assert torch.equal(Dropout(0.0)(ones), ones)
    assert not Dropout(1.0)(ones).any()
