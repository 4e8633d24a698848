"""How many cases of a test the fast suite takes; the others, spread evenly, are slow. 0: all of it is slow."""

from __future__ import annotations

from collections import defaultdict

import pytest

FAST = {
    "test_across.py": {
        "test_a_run_tells_what_trains_and_what_a_step_changes": 1,
        "test_the_peak_is_of_tensors_and_tells_arms_apart": 0,
    },
    "test_added.py": {
        "test_a_recipe_goes_on": 1,
        "test_saved_beside_the_base": 2,
        "test_inspect_of_a_folder": 2,
        "test_what_stays_goes_over_a_compressed_model": 0,
    },
    "test_analysis.py": {
        "test_a_plan_that_changes_nothing_has_no_error": 1,
        "test_a_trial_is_what_apply_does": 3,
        "test_kernels_are_those_of_the_formula": 2,
        "test_memory_does_not_grow_with_examples_times_parameters": 0,
        "test_several_methods_in_one_table": 0,
        "test_rows_measured_together_are_those_measured_alone": 0,
    },
    "test_any_size.py": {
        "test_a_generator_works_wherever": 0,
        "test_padding_may_have_no": 0,
        "test_sizes_that_are": 1,
    },
    "test_apart.py": {
        "test_opened_it_is_the_same_model": 1,
        "test_after_heads_went": 0,
        "test_in_another_dtype": 0,
        "test_the_next_save_takes_its_place_and_the_other_way_round": 0,
        "test_tuners_save_it_before_they_merge": 1,
        "test_other_parts_that_trained_and_shared_ffns": 0,
    },
    "test_apply.py": {
        "test_what_fails_half_way_leaves": 1,
        "test_planning_changes_no_bit": 6,
        "test_a_plan_and_its_successor": 0,
        "test_the_rehearsal_has_the_shapes_of_what_comes": 4,
        "test_ffns_tied_by_parameter_are_tuned_as_one": 1,
        "test_masked_language_models_reopen_as_they_were_tuned": 5,
    },
    "test_architectures.py": {
        "test_edits_of_an_architecture_are_right_after_reload_or_refused": 0,
    },
    "test_attention_linears.py": {
        "test_no_linear_is_both": 27,
    },
    "test_batches.py": {
        "test_every_form_of_data_gives": 1,
        "test_what_is_no_data_is_refused": 47,
        "test_floats_come_in_the_models_dtype": 5,
    },
    "test_blockwise.py": {
        "test_block_by_block_equals_whole_passes": 7,
    },
    "test_budget.py": {
        "test_the_applied_model_keeps_the_budget": 1,
        "test_methods_take_it_and_plans_keep_it": 3,
        "test_a_layer_of_duplicates": 1,
        "test_an_arm_with_a_budget_runs": 0,
    },
    "test_by_layer.py": {
        "test_compact_forms_and_fewer_layers_keep_what_layers_say": 0,
        "test_values_by_layer_of_other_kinds_are_no_hindrance": 2,
        "test_shared_and_narrowed_layers_of_a_list_open_and_export": 0,
    },
    "test_calibrating.py": {
        "test_statistics_give_the_very_plans": 0,
        "test_all_passes_are_in_eval_mode": 2,
        "test_merged_files_are_one_pass_over_all": 1,
    },
    "test_calibration_texts.py": {
        "test_the_setting_that_loses_least_on_held_out_text_is_taken": 0,
    },
    "test_checkpoint.py": {
        "test_a_trainer_saves_resumes_and_reloads_a_compact_model": 0,
    },
    "test_cli.py": {
        "test_run_a_recipe": 0,
        "test_dry_run_prints_the_plan_and_writes_nothing": 0,
        "test_a_saved_plan_gives_the_same_model": 0,
        "test_settings_that_do_not_fit": 10,
        "test_outputs_that_must_not_be_written": 0,
        "test_a_full_disk_is_one_line": 0,
        "test_tune_and_eval_on_a_table": 0,
        "test_tune_a_compact_body_without_a_head": 0,
        "test_distil_lora_and_no_fold": 0,
        "test_tune_refuses_in_one_line": 14,
        "test_a_search_tells_what_it_tried": 0,
        "test_compress_then_export_opens_plainly_with_equal_outputs": 0,
        "test_both_forms_with_tokenizer_card_and_history": 0,
        "test_damaged_weights_leave_the_old_output": 0,
    },
    "test_cli_analyze.py": {
        "test_methods_on_a_task_with_files": 0,
        "test_a_compressed_checkpoint_is_compared_like_its_method": 0,
        "test_methods_and_text": 0,
    },
    "test_closed_forms.py": {
        "test_refit_is_the_pulled": 1,
        "test_heads_that_go_are_taken_over_by_those_that_stay": 1,
        "test_refit_of_whole_neurons_from_statistics_is_the_regression_on_their_tokens": 5,
        "test_closed_forms_of_a_model_are_those_of_the_formulas": 4,
    },
    "test_combined.py": {
        "test_one_plan_does_what_two_do": 0,
    },
    "test_companions.py": {
        "test_sentence_transformers_stay_whole": 1,
    },
    "test_composition.py": {
        "test_one_plan_does_what_several_do": 0,
        "test_both_updates_on_a_compressed_model": 1,
        "test_ffns_without_updates_are_compressed": 1,
        "test_sparsegrad_on_ffns_and_dsee_on_attention": 0,
        "test_what_trained_beside_goes_back": 0,
        "test_dsee_on_the_attention_of_a_compressed": 1,
        "test_heads_go_from_a_model": 0,
        "test_lora_on_a_pruned_model": 2,
        "test_weights_in_few_bits": 1,
        "test_neurons_go_and_what_is_left_is_updated_in_one_plan": 0,
        "test_what_does_not_compose_is_refused_and_nothing_changed": 8,
        "test_an_adapter_of_peft_is_merged_before_what_needs_its_linears": 2,
    },
    "test_computed_weights.py": {
        "test_a_killed_recovery_ends": 0,
        "test_a_recipe_that_is_killed": 0,
    },
    "test_contract.py": {
        "test_compact_checkpoints_reload": 2,
        "test_a_fresh_process_opens": 1,
        "test_a_fresh_process_without_ffnkit_opens": 4,
        "test_a_fresh_process_without_ffnkit_refuses": 3,
        "test_transformers_own_classes_open": 3,
        "test_fusing_to_the_full_width": 2,
        "test_planning_changes_nothing": 3,
        "test_apply_returns_the_model_and_fold_keeps_its_outputs": 4,
        "test_the_counts_are_needed": 5,
        "test_duplicated_neurons_fuse_without_a_change": 2,
        "test_standard_exports_reload": 4,
        "test_other_weights_have_another_plan": 7,
        "test_a_saved_plan_applies_identically": 8,
    },
    "test_contract_kit.py": {
        "test_methods_keep_the_contract": 1,
        "test_tuners_keep_the_contract": 1,
        "test_what_a_model_does_not_bear_is_refused": 17,
        "test_families_keep_the_contract": 4,
    },
    "test_cost.py": {
        "test_kinds_of_models": 3,
        "test_a_head_of_other_labels_is_not_judged": 0,
        "test_no_fit_sees_what_is_reported": 0,
        "test_command_line": 0,
    },
    "test_cutting_masks.py": {
        "test_heads": 1,
        "test_ffns_and_layers": 0,
        "test_neurons": 1,
    },
    "test_damaged.py": {
        "test_what_is_damaged_at_random": 0,
        "test_every_field_of_a_plan_is_checked": 3,
        "test_every_field_of_a_description_is_checked_before_weights_are_read": 10,
        "test_names_that_no_file_can_have_are_one_line": 2,
    },
    "test_dead_ffns.py": {
        "test_weights_that_no_gradient_reaches": 0,
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
        "test_the_loss_falls": 1,
        "test_a_kill_changes_nothing": 1,
        "test_tune_the_teacher": 0,
        "test_distil_on_unlabelled_text": 0,
        "test_recipes_distil_answers_from_a_tuned_teacher_on_text": 0,
    },
    "test_dropping.py": {
        "test_a_model_without_a_layer": 2,
    },
    "test_dsee.py": {
        "test_a_plain_loop_trains": 1,
        "test_peft_opens_the_low_rank_part": 1,
        "test_every_support_has_exactly_so_many_entries": 6,
        "test_folded_equals_unfolded_in_every_family": 7,
        "test_adapters_come_and_go_to_the_bit": 1,
    },
    "test_dsee_reports.py": {
        "test_every_field_is_one_of_pefts": 0,
        "test_peft_reads_the_lora_config": 0,
        "test_a_body_below_a_task_head_is_read_by_the_bases_own_head": 1,
    },
    "test_embeddings.py": {
        "test_tuning_learns": 0,
        "test_metrics_are_those_of_a_plain_loop": 1,
    },
    "test_energy.py": {
        "test_command_line": 0,
        "test_over_steps_of_training": 0,
        "test_shares_are_those_of_a_slow_loop": 0,
        "test_runs_are_equal_whatever_is_held_at_a_time": 0,
    },
    "test_families.py": {
        "test_order_of": 36,
        "test_every_ffn_matters": 18,
        "test_rounding_stays": 18,
        "test_ffns_are_found_as_expected": 30,
        "test_numbers_agree_with_the_tensors": 48,
        "test_read_then_write_changes_no_bit": 60,
        "test_reading_gives_what_was_written": 68,
        "test_up_is_the_linear_side_of_a_gate": 26,
    },
    "test_folders.py": {
        "test_a_model_and_its_adapter_live_in_one_folder": 0,
        "test_a_live_output_of_another_process_is_left_alone_whatever_its_number": 0,
    },
    "test_forms.py": {
        "test_a_plan_is_refused_by_other_weights": 1,
        "test_config_and_tensors_keep_the_dtype": 1,
        "test_no_compact_checkpoint_opens": 0,
        "test_a_part_of_a_composite": 0,
        "test_what_a_checkpoint_lacks_is_refused_by_name": 3,
        "test_an_adapter_that_lacks_tensors_is_refused": 3,
        "test_outputs_are_the_same_in_every_form": 0,
        "test_code_of_its_own_runs_only_where_it_is_trusted": 0,
    },
    "test_formulas.py": {
        "test_a_sketch_keeps_squares": 0,
    },
    "test_fusion.py": {
        "test_more_restarts_are_never_worse_and_the_seed_decides": 0,
    },
    "test_generation.py": {
        "test_a_kill_changes_nothing": 0,
        "test_recipes_write": 0,
        "test_greedy_decoding_is_the_slow_loop": 1,
        "test_label_words_are_learnt": 0,
        "test_accumulation_weights": 0,
        "test_recipes_model_text": 0,
        "test_stories_are_likely": 0,
        "test_perplexity_is_the_slow_loop": 3,
        "test_beams_are_the_same_in_batches": 2,
        "test_a_text_stops_at_its_end": 0,
        "test_parts_of_a_split_are_scored_on_its_own_texts": 1,
        "test_tune_and_eval_of_files": 0,
    },
    "test_given_masks.py": {
        "test_weights_that_stay_are_those_of_the_file": 4,
    },
    "test_heads.py": {
        "test_removing_equals_zeroing": 3,
        "test_permuted_heads_give": 18,
        "test_every_family_has_attention": 30,
        "test_transformers_own_classes_open": 3,
        "test_compact_checkpoints_reload": 3,
        "test_standard_exports_reload": 3,
        "test_one_number_of_heads_in_all_layers": 4,
        "test_eager_and_sdpa_agree": 4,
        "test_masked_and_adapted_linears_lose_their_rows_too": 3,
        "test_a_reloaded_model_trains": 2,
        "test_a_trial_leaves_everything_as_it_was": 5,
        "test_generation_with_a_cache": 3,
        "test_the_score_of_the_update_is_that_of_query_and_value": 0,
    },
    "test_healing.py": {
        "test_interrupted_it_has_the_best_state": 0,
        "test_every_family_heals": 1,
        "test_zeros_stay_zeros_and_ties_stay_ties": 1,
        "test_command_line": 0,
    },
    "test_images.py": {
        "test_a_killed_run_ends": 0,
    },
    "test_instructions.py": {
        "test_packed_training_goes_on": 0,
        "test_answers_that_were_learned": 0,
        "test_tune_and_eval": 0,
    },
    "test_interrupted.py": {
        "test_an_interrupted_tuning_is_kept": 1,
        "test_a_tuning_that_fails_leaves_nothing": 0,
        "test_a_disk_that_fills_while_a_recipe_runs_is_one_line": 2,
    },
    "test_judging.py": {
        "test_a_recipe_has_its_answers_judged": 1,
    },
    "test_kmeans.py": {
        "test_pairs_equal_up_to_rounding": 2,
        "test_no_single_move_lowers_the_inertia": 0,
    },
    "test_layer_dtypes.py": {
        "test_every_dtype_is_a_dense_loop": 2,
    },
    "test_layer_numbers.py": {
        "test_what_moves_up_does_what_it_did": 0,
        "test_what_would_be_another_layer_is_refused_by_the_plan": 2,
        "test_heads_that_a_forward_does_not_bear_are_refused_by_the_plan": 0,
        "test_the_generation_config_follows_layers_and_heads": 0,
        "test_the_key_of_a_width_is_the_one_that_its_ffns_follow": 0,
    },
    "test_lifecycle.py": {
        "test_preparing_is_all_or_nothing": 4,
        "test_the_next_tuner_finds": 4,
        "test_a_run_that_stopped_goes_on": 0,
        "test_finishing_can_be_done_again": 2,
        "test_a_run_that_stops": 2,
        "test_what_is_abandoned_is_undone": 15,
        "test_updates_that_were_there_stay_where_a_run_stops": 0,
    },
    "test_lines.py": {
        "test_a_mistake_is_told_in_the_words_of_the_command": 14,
    },
    "test_members_own.py": {
        "test_lora_gives_each_layer_weights_of_its_own_and_says_so": 2,
        "test_on_disk_they_are_refused": 2,
        "test_few_bits_are_saved_once_with_what_is_not_shared": 1,
        "test_a_device_map_keeps_what_is_shared_and_what_is_not": 2,
        "test_shards_refuse_them_and_take_what_shares_nothing": 1,
    },
    "test_merging.py": {
        "test_the_tie_is_one_object": 1,
        "test_permuted_copies_merge": 2,
        "test_few_families_have_no_two_ffns_of_one_shape_in_one_stack": 50,
    },
    "test_methods.py": {
        "test_a_plan_serves_many_models": 1,
        "test_plan_apply_fold_save_and_export": 1,
        "test_neurons_that_the_data_never_use_go_without_loss": 1,
    },
    "test_mixed_text.py": {
        "test_command_line": 0,
    },
    "test_moe.py": {
        "test_compression_leaves_the_routers": 3,
        "test_routers_train_or_stay": 1,
        "test_a_killed_run_ends": 0,
        "test_distillation_runs": 1,
        "test_the_chain_comes_back": 0,
        "test_frozen_routers": 0,
        "test_routes_are_equal_at_the_first_fused_layer": 5,
        "test_adapters_leave_the_routers": 22,
        "test_experts_of_any_width_run": 2,
        "test_nothing_of_the_known_families_is_left_out": 0,
        "test_experts_keep_their_numbers": 3,
    },
    "test_nlg.py": {
        "test_real_data": 1,
        "test_people_agree_with_each_other_on_e2e": 0,
    },
    "test_old_files.py": {
        "test_plans": 3,
        "test_adapters": 3,
        "test_compact_checkpoints": 2,
    },
    "test_optimizer_hooks.py": {
        "test_hooks_go_with_the_last_layer": 1,
        "test_a_layer_that_comes_after_the_hooks_went_is_seen_to": 1,
    },
    "test_outside.py": {  # test_docs.py has the package of the page on adding
        "test_what": 0,
        "test_names_of_other": 0,
    },
    "test_pairs.py": {
        "test_no_stage_loses": 1,
        "test_a_tuner_that_is_abandoned_leaves_masks_and_thin_pairs": 0,
    },
    "test_pruning.py": {
        "test_modes_by_matrix_and_by_row": 6,
        "test_modes_are_those_of_torch": 2,
        "test_tuners_keep_zeros_when_asked": 2,
        "test_masks_come_back": 2,
        "test_a_masked_model_computes": 2,
        "test_the_standard_form_holds": 3,
        "test_two_pools_have_exact_counts_each": 0,
        "test_patterns_hold_in_every_group": 5,
        "test_wanda_is_a_loop_over_rows_with_the_inputs_norms": 2,
        "test_heads_embeddings_and_routers_are_never_pruned": 5,
        "test_zeros_stay_through_training": 2,
        "test_a_temporary_plan_masks_leaves_the_model_as_it_was": 5,
    },
    "test_quickstart_data.py": {
        "test_texts_are_many_distinct": 0,
        "test_no_text_names_its_library": 0,
        "test_splits": 0,
    },
    "test_recipe_run.py": {
        "test_killed_at_every_marker": 0,
        "test_killed_within_tuning": 0,
        "test_what_a_run_leaves": 0,
        "test_run_again_computes_nothing_and_writes_the_same": 0,
        "test_a_failed_unit_does_not_stop_the_others": 0,
        "test_another_recipe_is_refused": 1,
    },
    "test_regression.py": {
        "test_the_information_is_taken_where_it_is_asked_for": 0,
    },
    "test_reparametrized.py": {
        "test_it_is_refused_in_one_line": 0,
        "test_a_linear_of_attention_counts_too": 2,
        "test_it_is_found_and": 12,
        "test_a_wrapped_model_is_refused": 2,
    },
    "test_report.py": {
        "test_the_plot_is_against_flops_where_ffns_do_not_tell_arms_apart": 0,
    },
    "test_rows.py": {
        "test_standard_streams_may_be_closed": 0,
        "test_recipes_score_on_dev": 0,
        "test_text_stays_text": 30,
    },
    "test_search.py": {
        "test_a_stopped_search_goes_on": 0,
        "test_each_arm_gets_the_best": 1,
        "test_rates_that_fail": 0,
        "test_what_belongs_together_stays_on_one_side_of_the_rows_kept_apart": 0,
    },
    "test_settings.py": {
        "test_what_a_declaration_does_not_allow_is_refused_when_it_is_planned": 65,
    },
    "test_sharding.py": {
        "test_two_processes_end_where_one_does": 0,
    },
    "test_similarity.py": {
        "test_matrices_of_every_stack": 0,
        "test_encoder_to_decoder": 0,
    },
    "test_smallest.py": {
        "test_what_is_narrowed_loses_more_and_is_made_again_from_its_plans": 1,
    },
    "test_sparse_steps.py": {
        "test_the_trajectory_is": 2,
        "test_in_training_count": 1,
    },
    "test_sparsegrad.py": {
        "test_a_plain_loop_trains": 1,
        "test_adapters_come_and_go": 1,
        "test_chosen_entries_hold_the_most_energy": 4,
    },
    "test_stages.py": {
        "test_killed_within_pruning": 0,
        "test_killed_within_a_training": 0,
        "test_killed_at_every_marker": 0,
        "test_rows_say_what_the_stages_did": 0,
        "test_pruning_without_recovery": 0,
        "test_coefficients_are_drawn_until_they_have_chosen": 0,
        "test_pruning_by_what_no_tuning_leaves_is_refused_before_anything_runs": 19,
    },
    "test_standing.py": {
        "test_the_factor_is_that_of_least_squares": 1,
        "test_a_plain_checkpoint_gives_what_the_factor_in_the_stream_gives": 0,
    },
    "test_statistics.py": {
        "test_halves_merged": 7,
    },
    "test_steps.py": {
        "test_accumulation_is_a_larger_batch": 1,
        "test_more_processes_do_not_go_on_from_the_checkpoints_of_one": 0,
    },
    "test_stream.py": {
        "test_interrupted_at_every_block_it_goes_on_behind_the_last": 0,
        "test_every_weight_lies_in_a_file": 0,
    },
    "test_structured.py": {
        "test_the_target_is_met": 5,
        "test_plans_and_checkpoints": 0,
        "test_removing_equals_zeroing": 2,
        "test_the_smallest_coefficients_go": 0,
        "test_updates_lose_what": 1,
        "test_pretrained_decoders_lose_heads_and_neurons_with_their_updates": 1,
        "test_what_cannot_be_scored_is_said": 0,
        "test_coefficients_stand_before_every_output": 3,
    },
    "test_studies.py": {
        "test_a_run_tells_them": 1,
        "test_all_three_are_in_table_csv_and_page": 0,
    },
    "test_target_fits.py": {
        "test_a_choice_is_fitted_where_that_is_measured_better": 0,
        "test_one_share_for_all_is_fitted_beside_another_choice": 0,
        "test_three_layers_share_one_ffn": 0,
        "test_tied_embeddings_in_bfloat16": 0,
        "test_what_a_target_takes_is_told_before": 0,
    },
    "test_targets.py": {
        "test_the_saved_model_keeps_the_target_by_its_true_count": 0,
        "test_keys_and_values_are_those_that_a_run_keeps": 0,
        "test_a_target_of_time_is_measured": 0,
        "test_the_time_that_is_told_is_that_of_the_choice_that_is_taken": 0,
        "test_a_standard_checkpoint_needs_no_padding": 0,
        "test_an_attention_that_is_left_out_gives_nothing": 2,
        "test_compress_with_a_target": 0,
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
        "test_a_shared_adapter_leaves_the_tie": 3,
        "test_a_saved_adapter_goes_back_on_the_tied_model": 1,
    },
    "test_tied_placement.py": {
        "test_compiled_it_gives": 0,
        "test_a_device_map_keeps_the_tie": 4,
    },
    "test_tied_quantized.py": {
        "test_a_tied_model_is_quantized": 0,
        "test_tuning_over_a_quantized_base": 0,
        "test_adapters_train_over_one_quantized_weight_and_merge_right": 5,
    },
    "test_tied_training.py": {
        "test_a_trainer_of_the_users_own": 0,
        "test_tuning_of_a_tied_model": 0,
    },
    "test_token_masks.py": {
        "test_moments_of_padded_batches": 4,
    },
    "test_train_small.py": {
        "test_a_translator_with_a_tokenizer": 0,
    },
    "test_training_presets.py": {
        "test_dropout_is_that_of_a_model": 0,
    },
    "test_training_terms.py": {
        "test_the_head_may_be_named": 3,
        "test_a_training_smooths_labels_and_its_evaluation_does_not": 0,
        "test_what_was_compressed_is_known_by_the_plan_and_by_the_file": 0,
        "test_a_recipe_s_factor_is_for_its_compressed_arms": 0,
    },
    "test_translation.py": {
        "test_marian_learns_a_few": 1,
        "test_the_inverse_square_root_schedule": 0,
    },
    "test_trl.py": {
        "test_an_edited_model_no_longer_names_its_source": 0,
    },
    "test_tune.py": {
        "test_a_kill_changes_nothing": 0,
        "test_a_half_written_checkpoint": 0,
        "test_training_learns": 0,
        "test_a_moved_folder_resumes": 0,
        "test_a_fused_model_trains": 0,
        "test_equal_seeds_see": 1,
        "test_the_best_checkpoint_comes_back": 0,
        "test_ffn_trains_ffns_and_head": 25,
        "test_gradient_checkpointing": 0,
        "test_checkpoints_of_other_runs_are_refused": 1,
        "test_regression_goes_down": 0,
        "test_a_finished_run_is_not_trained_again": 0,
        "test_bf16_leaves_a_plain_model": 0,
        "test_a_run_that_stopped_early_is_not_trained_again": 0,
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
