"""Which test shows which row of the list of hostile inputs that the hub has to bear; `test_rows.py` checks it."""

from __future__ import annotations

from typing import Final

# Row → what comes, what is expected, and the tests, as "file::beginning of the test's name" under tests/.
ROWS: Final[dict[int, tuple[str, str, tuple[str, ...]]]] = {
    10: (
        "a reference `../x`, a URL, `%2e`, NUL, look-alike letters",
        "INVALID_ARGUMENT (REF_INVALID); a request never carries a path",
        (
            "hostile/test_hub_refs.py::test_row_10_",
            "hostile/test_hub_refs.py::test_rows_10_and_12_are_refused_by_every_verb",
            "hostile/test_hub_registry.py::test_row_10_every_call",
            "hostile/test_hub_bundles.py::test_an_index_that_lies",
            "hostile/test_wire.py::test_rows_2_to_12_invalid_arguments",
        ),
    ),
    11: (
        "an unknown adapter, or another tenant's",
        "NOT_FOUND, or at the shared hub FORBIDDEN: the same words whether it is there or not",
        (
            "hostile/test_wire.py::test_row_11_",
            "hostile/test_hub_registry.py::test_row_11_another_tenants",
            "hub/registry/test_tokens.py::test_what_may_not_be_read_is_left_out_and_not_found",
        ),
    ),
    12: (
        "a digest `sha256:../..`",
        "INVALID_ARGUMENT (REF_INVALID) before anything is opened",
        (
            "hostile/test_hub_refs.py::test_row_12_",
            "hostile/test_hub_refs.py::test_rows_10_and_12_are_refused_by_every_verb",
            "hostile/test_hub_registry.py::test_row_12_every_call",
            "hub/registry/test_transfer.py::test_hostile_uploads",
        ),
    ),
    13: (
        "an adapter as a pickle",
        "PICKLE_REFUSED, never opened",
        (
            "hostile/test_hub_adapters.py::test_row_13_",
            "hub/test_hugging_face.py::test_what_cannot_be_imported_says_why",
            "hostile/test_hub_bundles.py::test_a_manifest_with_other_files_is_refused",
        ),
    ),
    14: (
        "safetensors with a lying length, overlap, overflow, truncation, a huge header",
        "SAFETENSORS_MALFORMED",
        (
            "hostile/test_hub_adapters.py::test_row_14_",
            "hostile/test_hub_bundles.py::test_a_bundle_brings_nothing_that_a_push_would_not_take",
        ),
    ),
    15: (
        "extra files, archives, links",
        "UNEXPECTED_FILE; of a bundle BUNDLE_REFUSED",
        (
            "hostile/test_hub_adapters.py::test_row_15_",
            "hostile/test_hub_bundles.py::test_a_member_of_another_name",
            "hostile/test_hub_bundles.py::test_links_folders_and_devices",
            "hub/test_hugging_face.py::test_only_an_adapters_files_are_taken",
        ),
    ),
    16: (
        "rank 0, rank 65,536, also through rank_pattern",
        "RANK_INVALID in the hub; above the server's cap FAILED_PRECONDITION",
        (
            "hostile/test_hub_adapters.py::test_row_16_",
            "server/engine/test_engine.py::test_what_cannot_be_served_fails_its_request_alone",
        ),
    ),
    17: (
        "the wrong base, a wrong shape, an unknown target, a tensor that binds to nothing",
        "FAILED_PRECONDITION, naming it",
        (
            "hostile/test_hub_adapters.py::test_row_17_",
            "server/engine/test_engine.py::test_a_tensor_that_binds_to_nothing_is_named",
            "server/engine/test_engine.py::test_another_base_is_refused",
        ),
    ),
    18: (
        "NaN, infinities or absurd norms in the weights",
        "NON_FINITE, NORM_ABSURD; at run time only that row ends",
        (
            "hostile/test_hub_adapters.py::test_row_18_",
            "hub/registry/test_transfer.py::test_what_the_client_did_not_check_the_server_does",
            "server/engine/test_engine.py::test_nan_ends_its_own_row_and_leaves_no_trace",
        ),
    ),
    19: (
        "a config with code keys",
        "CONFIG_KEY_REFUSED: keys are an allow-list",
        ("hostile/test_hub_adapters.py::test_row_19_",),
    ),
    20: (
        "an adapter that ships a chat template or a tokenizer",
        "UNEXPECTED_FILE; from Hugging Face it is not even downloaded",
        (
            "hostile/test_hub_adapters.py::test_row_20_",
            "hub/test_hugging_face.py::test_only_an_adapters_files_are_taken",
        ),
    ),
    25: (
        "concurrent pushes of one version, moves of one alias",
        "the same bytes are one version; a lost compare-and-swap is ABORTED (ALIAS_MOVED)",
        (
            "hostile/test_hub_races.py::test_row_25_",
            "hostile/test_hub_registry.py::test_row_25_",
            "hub/test_races.py::test_",
        ),
    ),
}
