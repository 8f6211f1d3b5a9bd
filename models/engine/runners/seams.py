"""What the adapters use of vLLM's runners: an engine checks it at its start, a test in the next
vLLM's sources."""

from __future__ import annotations

from sluice.models.vllm_adapter.seams import Seam

_RUNNER = (
    "vllm_config",
    "device",
    "load_model",
    "get_model",
    "initialize_kv_cache",
    "kv_caches",
    "kv_cache_config",
    "attn_groups",
)

BOTH = (
    Seam(
        "v1/core/sched/output.py",
        "SchedulerOutput",
        ("scheduled_new_reqs", "scheduled_cached_reqs"),
    ),
    Seam(
        "v1/core/sched/output.py",
        "NewRequestData",
        ("req_id", "prompt_token_ids", "sampling_params", "block_ids", "num_computed_tokens"),
    ),
    Seam(
        "v1/worker/utils.py",
        "AttentionGroup",
        (
            "layer_names",
            "metadata_builders",
            "kernel_block_table",
            "create_metadata_builders",
            "get_metadata_builder",
            "build_metadata",
        ),
    ),
    Seam(
        "forward_context.py",
        "ForwardContext",
        ("attn_metadata", "slot_mapping", "all_moe_layers", "is_padding"),
    ),
    Seam("forward_context.py", "", ("get_forward_context", "override_forward_context")),
    Seam(
        "v1/attention/backend.py",
        "CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "is_prefilling",
            "positions",
            "replace",
        ),
    ),
    Seam(
        "v1/worker/gpu_worker.py",
        "Worker",
        (
            "use_v2_model_runner",
            "init_device",
            "_make_model_runner",
            "compile_or_warm_up_model",
            "execute_model",
            "sample_tokens",
        ),
    ),
)
"""Of either runner."""

TELEMETRY = (
    Seam("v1/outputs.py", "", ("EMPTY_MODEL_RUNNER_OUTPUT",)),
    Seam("v1/outputs.py", "AsyncModelRunnerOutput", ("get_output",)),
    Seam("v1/core/sched/scheduler.py", "Scheduler", ("requests", "vllm_config")),
    Seam("v1/core/sched/interface.py", "SchedulerInterface", ("has_unfinished_requests",)),
    Seam("v1/request.py", "Request", ("request_id", "client_index", "is_finished")),
    Seam(
        "v1/engine/__init__.py",
        "EngineCoreOutput",
        ("request_id", "finish_reason", "kv_transfer_params"),
    ),
    Seam("v1/engine/__init__.py", "EngineCoreOutputs", ("outputs", "scheduler_stats")),
    Seam("v1/metrics/stats.py", "SchedulerStats", ("kv_connector_stats",)),
    Seam("v1/engine/core.py", "EngineCore", ("scheduler",)),
    Seam("v1/engine/async_llm.py", "AsyncLLM", ("output_processor", "engine_core")),
    Seam("v1/engine/llm_engine.py", "LLMEngine", ("output_processor",)),
    Seam("v1/engine/core_client.py", "MPClient", ("engine_ranks_managed",)),
    Seam("config/parallel.py", "ParallelConfig", ("data_parallel_index", "world_size")),
)
"""Of the way from a worker to the API servers, beside what its patches wrap."""

V1 = (
    Seam(
        "v1/core/sched/output.py",
        "CachedRequestData",
        ("req_ids", "resumed_req_ids", "num_output_tokens"),
    ),
    Seam(
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner",
        (
            *_RUNNER,
            "_update_states",
            "_on_request_state_removed",
            "_prepare_inputs",
            "_model_forward",
            "_kernel_block_sizes",
            "input_batch",
            "optimistic_seq_lens_cpu",
        ),
    ),
    Seam(
        "v1/worker/gpu_input_batch.py",
        "InputBatch",
        (
            "num_reqs",
            "req_ids",
            "num_computed_tokens_cpu",
            "num_prompt_tokens",
            "num_prompt_tokens_cpu_tensor",
            "block_table",
        ),
    ),
    Seam(
        "v1/worker/block_table.py",
        "BlockTable",
        ("block_size", "slot_mapping", "get_device_tensor"),
    ),
)
"""Of the V1 runner."""

V2 = (
    Seam(
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner",
        (
            *_RUNNER,
            "finish_requests",
            "add_requests",
            "gather_batch_req_state",
            "prepare_attn",
            "kernel_block_sizes",
            "model",
            "req_states",
            "block_tables",
            "cudagraph_manager",
            "capture_model",
            "model_state",
            "input_buffers",
            "uses_inputs_embeds",
        ),
    ),
    Seam(
        "v1/worker/gpu/model_runner.py",
        "BatchReqState",
        ("req_ids", "num_scheduled_tokens", "idx_mapping_np"),
    ),
    Seam("v1/worker/gpu/states.py", "RequestState", ("num_computed_tokens_np", "prompt_len")),
    Seam("v1/worker/gpu/block_table.py", "BlockTables", ("block_tables", "block_sizes")),
    Seam("v1/worker/gpu/buffer_utils.py", "StagedWriteTensor", ("gpu",)),
    Seam("v1/worker/gpu/buffer_utils.py", "UvaBackedTensor", ("np",)),
    Seam(
        "v1/worker/gpu/input_batch.py",
        "InputBatch",
        (
            "idx_mapping",
            "num_reqs",
            "num_tokens",
            "seq_lens_cpu_upper_bound",
            "prefill_len_np",
            "positions",
            "input_ids",
        ),
    ),
    Seam(
        "v1/worker/gpu/cudagraph_utils.py",
        "CudaGraphManager",
        ("dispatch", "run_fullgraph", "graphs", "pool"),
    ),
    Seam("v1/worker/gpu/cudagraph_utils.py", "", ("prepare_inputs_to_capture",)),
    Seam("distributed/parallel_state.py", "", ("graph_capture",)),
    Seam(
        "v1/worker/gpu/cudagraph_utils.py",
        "BatchExecutionDescriptor",
        ("cg_mode", "num_tokens", "num_reqs", "num_active_loras"),
    ),
    Seam("v1/core/sched/output.py", "SchedulerOutput", ("finished_req_ids", "preempted_req_ids")),
    Seam("v1/core/sched/output.py", "NewRequestData", ("prefill_token_ids", "prompt_len")),
)
"""Of the V2 runner."""

SCHEDULER = (
    Seam("v1/core/sched/scheduler.py", "Scheduler", ("running", "waiting")),
    Seam(
        "v1/core/sched/request_queue.py",
        "FCFSRequestQueue",
        ("peek_request", "pop_request"),
    ),
    Seam("v1/request.py", "Request", ("arrival_time", "num_preemptions", "sampling_params")),
)
"""Of `--group-by-depth`."""
