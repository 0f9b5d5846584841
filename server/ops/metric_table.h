// Every metric that /metrics shows: the one place where names, types, texts and labels are written.
// REFERENCE.md repeats the table; a test compares it with this one and with a live server.
#pragma once

#include <array>

namespace headstart {

enum class MetricType { kCounter, kGauge, kHistogram };

struct MetricSpec {
  MetricType type;
  const char* name;
  const char* labels;  // comma-separated; all bounded
  const char* help;
};

namespace metric {

inline constexpr MetricSpec kRequests{MetricType::kCounter, "headstart_requests_total",
                                      "model,code,reason",
                                      "Prefill calls that ended, by gRPC code and reason"};
inline constexpr MetricSpec kValidRequests{
    MetricType::kCounter, "headstart_requests_valid_total", "model",
    "Prefill calls that ended and that count for the objective: all but wrong ones, and those that "
    "their client took back before their time was over"};
inline constexpr MetricSpec kWithinObjective{
    MetricType::kCounter, "headstart_requests_within_objective_total", "model",
    "Of these, those that ended OK within --objective-base and --objective-per-1k-tokens"};
inline constexpr MetricSpec kQueueRequests{MetricType::kGauge, "headstart_queue_requests", "model",
                                           "Accepted requests whose compute has not begun"};
inline constexpr MetricSpec kQueueTokens{MetricType::kGauge, "headstart_queue_tokens", "model",
                                         "Prompt tokens of queued requests"};
inline constexpr MetricSpec kRunningRequests{MetricType::kGauge, "headstart_running_requests",
                                             "model",
                                             "Requests that compute, send what was computed, or "
                                             "keep it to be fetched"};
inline constexpr MetricSpec kInflightTokens{
    MetricType::kGauge, "headstart_inflight_tokens", "model",
    "Prompt tokens of all accepted requests that have not ended"};
inline constexpr MetricSpec kQueueLimitRequests{
    MetricType::kGauge, "headstart_queue_limit_requests", "model",
    "Accepted requests, queued and running, at which the server refuses"};
inline constexpr MetricSpec kQueueLimitTokens{MetricType::kGauge, "headstart_queue_limit_tokens",
                                              "model",
                                              "Inflight tokens at which the server refuses"};
inline constexpr MetricSpec kTicketsAcquired{
    MetricType::kCounter, "headstart_tickets_acquired_total", "model", "Requests accepted"};
inline constexpr MetricSpec kTicketsReleased{
    MetricType::kCounter, "headstart_tickets_released_total", "model",
    "Accepted requests that ended and gave everything back"};

inline constexpr MetricSpec kTimeToFirstChunk{
    MetricType::kHistogram, "headstart_time_to_first_chunk_seconds", "model",
    "Accepted until the client's connection had taken the first KV chunk"};
inline constexpr MetricSpec kTimeToFirstToken{
    MetricType::kHistogram, "headstart_time_to_first_token_seconds", "model",
    "Accepted until the client's connection had taken the first token and all KV that the call "
    "ships, for requests that ended OK; of attached KV about the sum of queue, selection, "
    "attention, other compute, gave way, room wait and exposed transfer"};
inline constexpr MetricSpec kQueueTime{MetricType::kHistogram, "headstart_queue_seconds", "model",
                                       "Accepted until compute began"};
inline constexpr MetricSpec kComputeTime{
    MetricType::kHistogram, "headstart_compute_seconds", "model",
    "Selection, attention and other compute of requests that ended OK"};
inline constexpr MetricSpec kSelectionTime{MetricType::kHistogram, "headstart_selection_seconds",
                                           "model", "Choosing key blocks"};
inline constexpr MetricSpec kAttentionTime{MetricType::kHistogram, "headstart_attention_seconds",
                                           "model", "Attention over the chosen blocks"};
inline constexpr MetricSpec kOtherComputeTime{MetricType::kHistogram,
                                              "headstart_other_compute_seconds", "model",
                                              "Everything else of the model"};
inline constexpr MetricSpec kGaveWayTime{
    MetricType::kHistogram, "headstart_gave_way_seconds", "model",
    "Between begin and end of compute, when others ran, one a prompt that ended OK"};
inline constexpr MetricSpec kExposedTransferTime{
    MetricType::kHistogram, "headstart_exposed_transfer_seconds", "model",
    "End of compute, or opening of the call if that was later, until the client's connection had "
    "taken the last KV, one a stream that ended OK"};
inline constexpr MetricSpec kRequestTime{MetricType::kHistogram, "headstart_request_seconds",
                                         "model", "Accepted until ended, however it ended"};

inline constexpr MetricSpec kEstimateError{
    MetricType::kHistogram, "headstart_ttft_estimate_error_ratio", "model",
    "Predicted less real time from accepted to computed, as a share of the real one without its "
    "sign, one a prompt that ended OK, had a prediction, and did not wait for room"};
inline constexpr MetricSpec kPredictedDrain{
    MetricType::kGauge, "headstart_predicted_drain_seconds", "model",
    "Time to compute all that is accepted; absent before the server has learned from prompts that "
    "ran"};
inline constexpr MetricSpec kSteps{
    MetricType::kCounter, "headstart_steps_total", "model,kind",
    "Ways through the layers that have ended; urgent: between two layers of a main one"};
inline constexpr MetricSpec kStepPieces{
    MetricType::kCounter, "headstart_step_pieces_total", "model",
    "Pieces of prompts in steps; by step, how many requests ran together"};

inline constexpr MetricSpec kPromptTokens{MetricType::kHistogram, "headstart_prompt_tokens",
                                          "model", "Length of accepted prompts"};
inline constexpr MetricSpec kPromptTokensTotal{
    MetricType::kCounter, "headstart_prompt_tokens_total", "model,source",
    "Prompt tokens of requests that ended OK, by where their KV came from"};
inline constexpr MetricSpec kKvBytesSent{
    MetricType::kCounter, "headstart_kv_bytes_sent_total", "model,stripes",
    "KV bytes that connections have taken, by how many stripes "
    "the client fetches (1: also what Prefill ships)"};
inline constexpr MetricSpec kKvChunksSent{MetricType::kCounter, "headstart_kv_chunks_sent_total",
                                          "model", "KV chunks that connections have taken"};
inline constexpr MetricSpec kKvOverlap{
    MetricType::kHistogram, "headstart_kv_overlap_ratio", "model",
    "Share of a stream's KV that the connection had taken before compute ended, one a stream that "
    "ended OK"};
inline constexpr MetricSpec kKvRoomWait{MetricType::kHistogram, "headstart_kv_room_wait_seconds",
                                        "model",
                                        "Time a request could not compute because host memory was "
                                        "full of KV that nobody had taken, one "
                                        "a request that had to wait and ended OK"};
inline constexpr MetricSpec kKvRoomWaiting{
    MetricType::kGauge, "headstart_kv_room_waiting_requests", "model",
    "Requests that do not compute now because host memory is full of KV that nobody has taken"};
inline constexpr MetricSpec kKvTransferFailures{
    MetricType::kCounter, "headstart_kv_transfer_failures_total", "model,reason",
    "Requests that ended before their client had all KV although compute had begun"};
inline constexpr MetricSpec kKvFetches{MetricType::kCounter, "headstart_kv_fetches_total",
                                       "model,code", "FetchKv calls that ended, by gRPC code"};
inline constexpr MetricSpec kKvFetchStreams{MetricType::kGauge, "headstart_kv_fetch_streams",
                                            "model", "FetchKv calls that follow KV now"};
inline constexpr MetricSpec kKvResumes{MetricType::kCounter, "headstart_kv_resumes_total", "model",
                                       "FetchKv calls that went on after another one"};
inline constexpr MetricSpec kKvLeases{MetricType::kGauge, "headstart_kv_leases", "model",
                                      "Computed prompts whose detached KV is kept"};
inline constexpr MetricSpec kKvLeaseTokens{MetricType::kGauge, "headstart_kv_lease_tokens", "model",
                                           "Prompt tokens of these"};
inline constexpr MetricSpec kKvLeasesExpired{
    MetricType::kCounter, "headstart_kv_leases_expired_total", "model",
    "Detached KV that was given up because its lease ended"};
inline constexpr MetricSpec kHostKvBytes{MetricType::kGauge, "headstart_host_kv_bytes", "state",
                                         "Host memory for KV on its way out"};
inline constexpr MetricSpec kKvPoolBlocks{
    MetricType::kGauge, "headstart_kv_pool_blocks", "state",
    "Pages of the KV pool; cached: nobody's, with KV that prompts that begin alike will find"};
inline constexpr MetricSpec kKvPoolAcquired{
    MetricType::kCounter, "headstart_kv_pool_blocks_acquired_total", "",
    "Pages handed out, those that were found in the prefix cache included"};
inline constexpr MetricSpec kKvPoolReleased{
    MetricType::kCounter, "headstart_kv_pool_blocks_released_total", "", "Pages given back"};
inline constexpr MetricSpec kKvPoolEvictions{MetricType::kCounter,
                                             "headstart_kv_pool_evictions_total", "",
                                             "Cached pages that were taken for other KV"};
inline constexpr MetricSpec kKvCacheUtilization{
    MetricType::kGauge, "headstart_kv_cache_utilization_ratio", "",
    "Share of the KV pool that requests use; cached pages are not used"};

inline constexpr MetricSpec kAttentionDensity{
    MetricType::kHistogram, "headstart_attention_density_ratio", "model",
    "Executed share of the causal attention blocks of a prompt"};
inline constexpr MetricSpec kExecutedBlocks{MetricType::kCounter,
                                            "headstart_attention_executed_blocks_total",
                                            "model,layer", "Query-key blocks that attention ran"};
inline constexpr MetricSpec kCausalBlocks{MetricType::kCounter,
                                          "headstart_attention_causal_blocks_total", "model,layer",
                                          "Query-key blocks that dense attention would have run"};
inline constexpr MetricSpec kPredictedBlocks{
    MetricType::kCounter, "headstart_attention_predicted_blocks_total", "model,layer",
    "Query-key blocks that the heads' budgets ask for, before dense tail and dense fallback; those "
    "that ran where no budget is estimated"};
inline constexpr MetricSpec kLayerSparsity{MetricType::kGauge, "headstart_layer_sparsity_ratio",
                                           "model,layer",
                                           "1 - executed / causal blocks of the last prompt"};
inline constexpr MetricSpec kAttentionFallback{
    MetricType::kCounter, "headstart_attention_fallback_total", "model,reason",
    "Dense attention although ProxyAttn was asked for: whole prompts below the dense limit, or "
    "layers times pieces whose selection kept too much"};
inline constexpr MetricSpec kNonfiniteOutputs{
    MetricType::kCounter, "headstart_nonfinite_outputs_total", "model",
    "Requests that failed because the model computed NaN or infinity"};

inline constexpr MetricSpec kReady{MetricType::kGauge, "headstart_ready", "",
                                   "1 when requests are taken and compute makes progress"};
inline constexpr MetricSpec kDraining{MetricType::kGauge, "headstart_draining", "",
                                      "1 after SIGTERM or /drain"};
inline constexpr MetricSpec kStuck{MetricType::kGauge, "headstart_stuck", "",
                                   "1 when a step runs and no layer finished for --stuck-after"};
inline constexpr MetricSpec kDrainDeadline{
    MetricType::kGauge, "headstart_drain_deadline_seconds", "",
    "Unix time at which a drain cancels what is left; 0 before there is one"};
inline constexpr MetricSpec kModelLoadTime{MetricType::kGauge, "headstart_model_load_seconds", "",
                                           "Time that loading the model took"};
inline constexpr MetricSpec kLayersDone{MetricType::kCounter, "headstart_layers_done_total", "",
                                        "Layers that compute has finished: progress"};
inline constexpr MetricSpec kBuildInfo{MetricType::kGauge, "headstart_build_info",
                                       "version,backend,options_hash",
                                       "1; options_hash: of all options but those of listeners"};
inline constexpr MetricSpec kModelInfo{MetricType::kGauge, "headstart_model_info",
                                       "model,model_hash,architecture,kv_dtype,device",
                                       "1, once the model is loaded"};
inline constexpr MetricSpec kCacheConfigInfo{MetricType::kGauge, "headstart_cache_config_info",
                                             "block_size,num_blocks", "1"};

inline constexpr MetricSpec kConnections{MetricType::kGauge, "headstart_connections", "",
                                         "Open connections of the gRPC listener"};
inline constexpr MetricSpec kConnectionsAccepted{MetricType::kCounter,
                                                 "headstart_connections_accepted_total", "",
                                                 "Connections taken since the start"};
inline constexpr MetricSpec kConnectionsShed{MetricType::kCounter,
                                             "headstart_connections_shed_total", "reason",
                                             "Connections closed at once because of a limit"};

inline constexpr MetricSpec kConnectionsCut{
    MetricType::kCounter, "headstart_connections_cut_total", "reason",
    "Open connections that were closed because of what came over them: more bytes than calls "
    "account "
    "for, or too many calls that ended before their message"};

inline constexpr MetricSpec kTlsNotAfter{
    MetricType::kGauge, "headstart_tls_certificate_not_after_seconds", "certificate",
    "Unix time at which the certificate that is in use ends; client_ca: the last one of the "
    "bundle; "
    "absent without TLS"};
inline constexpr MetricSpec kTlsReloads{
    MetricType::kCounter, "headstart_tls_reloads_total", "result",
    "Looks at certificate files that found new ones and took them, or found what can't be used"};

inline constexpr MetricSpec kTraceSpansExported{MetricType::kCounter,
                                                "headstart_trace_spans_exported_total", "",
                                                "Spans that the collector of traces has taken"};
inline constexpr MetricSpec kTraceSpansDropped{
    MetricType::kCounter, "headstart_trace_spans_dropped_total", "",
    "Spans that were given up: no room to wait, or refused by the collector"};

inline constexpr MetricSpec kProcessCpu{MetricType::kCounter, "process_cpu_seconds_total", "",
                                        "User and system time of the process"};
inline constexpr MetricSpec kProcessResident{MetricType::kGauge, "process_resident_memory_bytes",
                                             "", "Resident memory of the process"};
inline constexpr MetricSpec kProcessVirtual{MetricType::kGauge, "process_virtual_memory_bytes", "",
                                            "Virtual memory of the process"};
inline constexpr MetricSpec kProcessOpenFds{MetricType::kGauge, "process_open_fds", "",
                                            "Open file descriptors"};
inline constexpr MetricSpec kProcessMaxFds{MetricType::kGauge, "process_max_fds", "",
                                           "Limit of open file descriptors"};
inline constexpr MetricSpec kProcessThreads{MetricType::kGauge, "process_threads", "", "Threads"};
inline constexpr MetricSpec kProcessStart{MetricType::kGauge, "process_start_time_seconds", "",
                                          "Start of the process, Unix time"};

inline constexpr std::array kAll = {kRequests,
                                    kValidRequests,
                                    kWithinObjective,
                                    kQueueRequests,
                                    kQueueTokens,
                                    kRunningRequests,
                                    kInflightTokens,
                                    kQueueLimitRequests,
                                    kQueueLimitTokens,
                                    kTicketsAcquired,
                                    kTicketsReleased,
                                    kTimeToFirstChunk,
                                    kTimeToFirstToken,
                                    kQueueTime,
                                    kComputeTime,
                                    kSelectionTime,
                                    kAttentionTime,
                                    kOtherComputeTime,
                                    kGaveWayTime,
                                    kExposedTransferTime,
                                    kRequestTime,
                                    kEstimateError,
                                    kPredictedDrain,
                                    kSteps,
                                    kStepPieces,
                                    kPromptTokens,
                                    kPromptTokensTotal,
                                    kKvBytesSent,
                                    kKvChunksSent,
                                    kKvOverlap,
                                    kKvRoomWait,
                                    kKvRoomWaiting,
                                    kKvTransferFailures,
                                    kKvFetches,
                                    kKvFetchStreams,
                                    kKvResumes,
                                    kKvLeases,
                                    kKvLeaseTokens,
                                    kKvLeasesExpired,
                                    kHostKvBytes,
                                    kKvPoolBlocks,
                                    kKvPoolAcquired,
                                    kKvPoolReleased,
                                    kKvPoolEvictions,
                                    kKvCacheUtilization,
                                    kAttentionDensity,
                                    kExecutedBlocks,
                                    kCausalBlocks,
                                    kPredictedBlocks,
                                    kLayerSparsity,
                                    kAttentionFallback,
                                    kNonfiniteOutputs,
                                    kReady,
                                    kDraining,
                                    kStuck,
                                    kDrainDeadline,
                                    kModelLoadTime,
                                    kLayersDone,
                                    kBuildInfo,
                                    kModelInfo,
                                    kCacheConfigInfo,
                                    kConnections,
                                    kConnectionsAccepted,
                                    kConnectionsShed,
                                    kConnectionsCut,
                                    kTlsNotAfter,
                                    kTlsReloads,
                                    kTraceSpansExported,
                                    kTraceSpansDropped,
                                    kProcessCpu,
                                    kProcessResident,
                                    kProcessVirtual,
                                    kProcessOpenFds,
                                    kProcessMaxFds,
                                    kProcessThreads,
                                    kProcessStart};

}  // namespace metric
}  // namespace headstart
