"""Products over families, methods or tuners: how many of their cases the fast suite takes, the others are slow."""

from __future__ import annotations

from collections import defaultdict

import pytest

FAST = {
    "test_added.py": {
        "test_a_recipe_goes_on": 1,
        "test_saved_beside_the_base": 8,
        "test_inspect_of_a_folder": 4,
    },
    "test_analysis.py": {
        "test_a_plan_that_changes_nothing_has_no_error": 4,
        "test_a_trial_is_what_apply_does": 7,
    },
    "test_any_size.py": {
        "test_a_generator_works_wherever": 0,
        "test_padding_may_have_no": 1,
        "test_sizes_that_are": 3,
    },
    "test_apart.py": {
        "test_opened_it_is_the_same_model": 3,
    },
    "test_apply.py": {
        "test_what_fails_half_way_leaves": 4,
        "test_planning_changes_no_bit": 6,
        "test_a_plan_and_its_successor": 1,
    },
    "test_attention_linears.py": {
        "test_no_linear_is_both": 27,
    },
    "test_batches.py": {
        "test_every_form_of_data_gives": 3,
        "test_what_is_no_data_is_refused": 52,
    },
    "test_budget.py": {
        "test_the_applied_model_keeps_the_budget": 4,
        "test_methods_take_it_and_plans_keep_it": 5,
        "test_a_layer_of_duplicates": 3,
    },
    "test_calibrating.py": {
        "test_statistics_give_the_very_plans": 2,
    },
    "test_cli.py": {
        "test_run_a_recipe": 0,
    },
    "test_closed_forms.py": {
        "test_refit_is_the_pulled": 7,
    },
    "test_composition.py": {
        "test_one_plan_does_what_several_do": 2,
        "test_both_updates_on_a_compressed_model": 2,
        "test_ffns_without_updates_are_compressed": 2,
        "test_sparsegrad_on_ffns_and_dsee_on_attention": 2,
        "test_what_trained_beside_goes_back": 2,
        "test_dsee_on_the_attention_of_a_compressed": 3,
        "test_heads_go_from_a_model": 1,
        "test_lora_on_a_pruned_model": 2,
        "test_weights_in_few_bits": 1,
    },
    "test_computed_weights.py": {
        "test_a_killed_recovery_ends": 0,
        "test_a_recipe_that_is_killed": 0,
    },
    "test_contract.py": {
        "test_compact_checkpoints_reload": 10,
        "test_a_fresh_process_opens": 4,
        "test_a_fresh_process_without_ffnkit_opens": 4,
        "test_a_fresh_process_without_ffnkit_refuses": 3,
        "test_transformers_own_classes_open": 6,
        "test_fusing_to_the_full_width": 4,
        "test_planning_changes_nothing": 4,
    },
    "test_contract_kit.py": {
        "test_methods_keep_the_contract": 3,
        "test_tuners_keep_the_contract": 6,
    },
    "test_cost.py": {
        "test_kinds_of_models": 4,
    },
    "test_cutting_masks.py": {
        "test_heads": 2,
        "test_ffns_and_layers": 2,
        "test_neurons": 4,
    },
    "test_damaged.py": {
        "test_what_is_damaged_at_random": 0,
    },
    "test_dead_ffns.py": {
        "test_weights_that_no_gradient_reaches": 2,
        "test_every_plan_is_finite": 1,
    },
    "test_decoder_heads.py": {
        "test_a_recipe_in_the_papers": 0,
    },
    "test_distil.py": {
        "test_it_learns_and_changes": 3,
        "test_a_kill_changes_nothing": 2,
    },
    "test_distil_variants.py": {
        "test_the_loss_falls": 4,
        "test_a_kill_changes_nothing": 2,
        "test_tune_the_teacher": 0,
    },
    "test_dropping.py": {
        "test_a_model_without_a_layer": 5,
    },
    "test_dsee.py": {
        "test_a_plain_loop_trains": 4,
        "test_peft_opens_the_low_rank_part": 3,
    },
    "test_dsee_reports.py": {
        "test_every_field_is_one_of_pefts": 0,
        "test_peft_reads_the_lora_config": 0,
    },
    "test_energy.py": {
        "test_command_line": 0,
        "test_over_steps_of_training": 0,
        "test_shares_are_those_of_a_slow_loop": 2,
    },
    "test_families.py": {
        "test_order_of": 36,
        "test_every_ffn_matters": 18,
        "test_rounding_stays": 18,
    },
    "test_forms.py": {
        "test_a_plan_is_refused_by_other_weights": 4,
        "test_config_and_tensors_keep_the_dtype": 5,
        "test_no_compact_checkpoint_opens": 0,
        "test_a_part_of_a_composite": 2,
    },
    "test_formulas.py": {
        "test_a_sketch_keeps_squares": 1,
    },
    "test_generation.py": {
        "test_a_kill_changes_nothing": 1,
        "test_recipes_write": 0,
        "test_greedy_decoding_is_the_slow_loop": 3,
        "test_label_words_are_learnt": 1,
        "test_accumulation_weights": 0,
        "test_recipes_model_text": 0,
        "test_stories_are_likely": 0,
    },
    "test_heads.py": {
        "test_removing_equals_zeroing": 14,
        "test_permuted_heads_give": 20,
        "test_every_family_has_attention": 30,
        "test_transformers_own_classes_open": 6,
        "test_compact_checkpoints_reload": 8,
        "test_standard_exports_reload": 8,
        "test_one_number_of_heads_in_all_layers": 8,
    },
    "test_healing.py": {
        "test_every_family_heals": 4,
    },
    "test_images.py": {
        "test_a_killed_run_ends": 0,
    },
    "test_instructions.py": {
        "test_packed_training_goes_on": 0,
        "test_answers_that_were_learned": 0,
    },
    "test_interrupted.py": {
        "test_an_interrupted_tuning_is_kept": 1,
    },
    "test_judging.py": {
        "test_a_recipe_has_its_answers_judged": 1,
    },
    "test_kmeans.py": {
        "test_pairs_equal_up_to_rounding": 3,
    },
    "test_layer_dtypes.py": {
        "test_every_dtype_is_a_dense_loop": 5,
    },
    "test_layer_numbers.py": {
        "test_what_moves_up_does_what_it_did": 4,
    },
    "test_lifecycle.py": {
        "test_preparing_is_all_or_nothing": 5,
        "test_the_next_tuner_finds": 8,
        "test_a_run_that_stopped_goes_on": 0,
        "test_finishing_can_be_done_again": 5,
        "test_a_run_that_stops": 3,
        "test_what_is_abandoned_is_undone": 20,
    },
    "test_merging.py": {
        "test_the_tie_is_one_object": 3,
        "test_permuted_copies_merge": 5,
    },
    "test_methods.py": {
        "test_a_plan_serves_many_models": 1,
        "test_plan_apply_fold_save_and_export": 7,
    },
    "test_mixed_text.py": {
        "test_command_line": 0,
    },
    "test_moe.py": {
        "test_compression_leaves_the_routers": 8,
        "test_routers_train_or_stay": 5,
        "test_a_killed_run_ends": 0,
        "test_distillation_runs": 3,
        "test_the_chain_comes_back": 0,
        "test_frozen_routers": 0,
    },
    "test_old_files.py": {
        "test_plans": 11,
    },
    "test_outside.py": {  # test_docs.py has the package of the page on adding
        "test_what": 0,
        "test_names_of_other": 0,
    },
    "test_pairs.py": {
        "test_no_stage_loses": 1,
    },
    "test_pruning.py": {
        "test_modes_by_matrix_and_by_row": 8,
        "test_modes_are_those_of_torch": 5,
        "test_tuners_keep_zeros_when_asked": 5,
        "test_masks_come_back": 6,
        "test_a_masked_model_computes": 7,
        "test_the_standard_form_holds": 5,
    },
    "test_quickstart_data.py": {
        "test_texts_are_many_distinct": 0,
    },
    "test_recipe_run.py": {
        "test_killed_at_every_marker": 0,
        "test_killed_within_tuning": 0,
    },
    "test_reparametrized.py": {
        "test_it_is_refused_in_one_line": 3,
        "test_a_linear_of_attention_counts_too": 4,
        "test_it_is_found_and": 12,
    },
    "test_rows.py": {
        "test_standard_streams_may_be_closed": 1,
        "test_recipes_score_on_dev": 0,
        "test_text_stays_text": 30,
    },
    "test_search.py": {
        "test_a_stopped_search_goes_on": 0,
        "test_each_arm_gets_the_best": 1,
        "test_rates_that_fail": 0,
    },
    "test_sharding.py": {
        "test_two_processes_end_where_one_does": 0,
    },
    "test_similarity.py": {
        "test_matrices_of_every_stack": 1,
        "test_encoder_to_decoder": 0,
    },
    "test_sparse_steps.py": {
        "test_the_trajectory_is": 4,
        "test_in_training_count": 1,
    },
    "test_sparsegrad.py": {
        "test_a_plain_loop_trains": 3,
    },
    "test_stages.py": {
        "test_killed_within_pruning": 0,
        "test_killed_within_a_training": 0,
        "test_killed_at_every_marker": 0,
        "test_rows_say_what_the_stages_did": 0,
    },
    "test_statistics.py": {
        "test_halves_merged": 15,
    },
    "test_steps.py": {
        "test_accumulation_is_a_larger_batch": 1,
    },
    "test_structured.py": {
        "test_the_target_is_met": 5,
        "test_plans_and_checkpoints": 2,
        "test_removing_equals_zeroing": 4,
        "test_the_smallest_coefficients_go": 2,
        "test_updates_lose_what": 4,
    },
    "test_studies.py": {
        "test_a_run_tells_them": 1,
    },
    "test_tasks.py": {
        "test_real_rows": 2,
    },
    "test_tickets.py": {
        "test_rounds_are_those": 1,
        "test_killed_between_and_within": 0,
        "test_a_step_that_does_not_come": 0,
    },
    "test_tied_lora.py": {
        "test_tuning_with_an_adapter_for_each_layer": 0,
        "test_each_layer_has_its_adapter": 2,
    },
    "test_tied_placement.py": {
        "test_compiled_it_gives": 0,
    },
    "test_tied_quantized.py": {
        "test_a_tied_model_is_quantized": 3,
        "test_tuning_over_a_quantized_base": 0,
    },
    "test_tied_training.py": {
        "test_a_trainer_of_the_users_own": 1,
        "test_tuning_of_a_tied_model": 0,
    },
    "test_token_masks.py": {
        "test_moments_of_padded_batches": 6,
    },
    "test_train_small.py": {
        "test_a_translator_with_a_tokenizer": 0,
    },
    "test_training_presets.py": {
        "test_dropout_is_that_of_a_model": 0,
    },
    "test_training_terms.py": {
        "test_the_head_may_be_named": 4,
    },
    "test_translation.py": {
        "test_marian_learns_a_few": 1,
    },
    "test_tune.py": {
        "test_a_kill_changes_nothing": 0,
        "test_a_half_written_checkpoint": 0,
        "test_training_learns": 3,
        "test_a_moved_folder_resumes": 0,
        "test_a_fused_model_trains": 0,
        "test_equal_seeds_see": 1,
        "test_the_best_checkpoint_comes_back": 1,
        "test_ffn_trains_ffns_and_head": 25,
        "test_gradient_checkpointing": 1,
    },
}


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark the cases that ``FAST`` leaves out; those that stay are spread evenly over the product."""
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        for start in FAST.get(item.path.name, ()):
            if item.name.startswith(start) and item.get_closest_marker("slow") is None:
                cases[item.path.name, start].append(item)
    for (file, start), found in cases.items():
        wanted = FAST[file][start]
        stay = {number * len(found) // wanted for number in range(wanted)} if wanted else set()
        for number, item in enumerate(found):
            if number not in stay:
                item.add_marker(pytest.mark.slow)
