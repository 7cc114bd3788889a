"""FusionConfig: what it takes, what it says of bad input; and every row of the precedence table."""

import json

import pytest

from fd_fusion.config import FusionConfig, resolve

FLAG = "--enable-flashinfer-allreduce-fusion"


@pytest.mark.parametrize(
    "key, value",
    [
        ("enable_all_reduce_rms_norm", 1),
        ("enable_qk_rms_norm", "yes"),
        ("strict", None),
        ("backend", "nccl"),
        ("max_token_num", 0),
        ("max_token_num", True),
        ("max_token_num", 2.5),
        ("workspace_mb", 0),
        ("workspace_mb", "32"),
        ("timeout_s", 0),
        ("timeout_s", True),
        ("timeout_s", "30"),
        ("max_tokens", 5),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(key, value):
    with pytest.raises(ValueError, match=key) as error:
        FusionConfig.from_dict({key: value})
    assert repr(value) in str(error.value) or "unknown key" in str(error.value)
    assert "allowed" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"triton"'])
def test_bad_json_is_one_sentence(text):
    with pytest.raises(ValueError, match="fusion config"):
        FusionConfig.from_json(text)


def test_round_trip_and_frozen():
    config = FusionConfig(backend="triton", max_token_num=128, strict=True)
    assert FusionConfig.from_json(json.dumps(config.to_dict())) == config
    with pytest.raises(AttributeError):
        config.backend = "paddle"


ENV = {"FD_FUSION_CONFIG": '{"max_token_num": 7}'}
OFF = {"FD_FUSION_DISABLE": "1"}


@pytest.mark.parametrize(
    "explicit, flag, environ, source, limit",
    [
        (None, None, {}, "no source", None),
        (None, False, {}, "no source", None),
        (None, True, {}, FLAG, None),
        (None, True, ENV, "FD_FUSION_CONFIG", 7),
        (None, False, ENV, "FD_FUSION_CONFIG", 7),  # upstream's false default vetoes nothing
        ('{"max_token_num": 5}', True, ENV, "--fusion-config", 5),
        ({"max_token_num": 5}, False, {}, "--fusion-config", 5),
        (FusionConfig(max_token_num=5), None, ENV, "--fusion-config", 5),
        ('{"max_token_num": 5}', True, {**ENV, **OFF}, "FD_FUSION_DISABLE", None),
        (None, None, {"FD_FUSION_CONFIG": "  "}, "no source", None),
        (None, None, {**ENV, "FD_FUSION_DISABLE": "0"}, "FD_FUSION_CONFIG", 7),
    ],
)
def test_precedence(explicit, flag, environ, source, limit):
    got = resolve(explicit, explicit_source="--fusion-config", upstream_flag=flag, environ=environ)
    assert got.source == source
    off = source in ("no source", "FD_FUSION_DISABLE")
    assert (got.config is None) == off == (got.reason is not None)
    if not off:
        assert got.config.max_token_num == limit


def test_a_malformed_source_is_named_but_only_if_it_wins():
    bad = {"FD_FUSION_CONFIG": '{"backend": "nccl"}'}
    with pytest.raises(ValueError, match=r"FD_FUSION_CONFIG.*backend.*'nccl'.*triton"):
        resolve(environ=bad)
    assert resolve("{}", environ=bad).config == FusionConfig()
    assert resolve(environ={**bad, **OFF}).config is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"max_token_num": ' + "1" * 5000 + "}"], ids=["deep", "long"])
def test_json_beyond_pythons_limits_is_an_error_that_says_what_is_expected(text):
    with pytest.raises(ValueError, match="is not JSON"):
        FusionConfig.from_json(text)


@pytest.mark.parametrize("changes, insists", [({}, False), ({"strict": True}, True), ({"backend": "triton"}, True)])
def test_who_insists_has_named_a_backend_or_asked_for_strict(changes, insists):
    assert FusionConfig(**changes).insists is insists
