// The CUDA attention and selection behind a C interface, for attention_bench.py: they run on a
// stream and on memory of PyTorch's, beside the peers that they are measured against.
#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "kernels/cuda/block_selector.h"
#include "kernels/cuda/launchers.h"

namespace {

using headstart::BudgetRule;
using headstart::DType;
using headstart::HeadShape;
using headstart::KvPages;
using headstart::ProxyAttnOptions;

// What one call works on; mirrored in attention_bench.py.
struct Problem {
  void* q;    // bf16 [rows, q_stride]
  void* out;  // bf16 [rows, H d]
  void* pages;
  const int32_t* page_table;
  float* budget_ratio;
  int64_t rows, q_stride, first_position;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t selected;
  int32_t num_proxies, stride, shared_budget, dense_tail_blocks;
  float gamma, forced_density;
};

struct Context {
  explicit Context(int num_sms) : num_sms(num_sms), selector(num_sms) {}
  int num_sms;
  headstart::cuda::BlockSelector selector;
  headstart::cuda::DeviceMemory tile_counter;
};

KvPages PagesOf(const Problem& p) {
  return {p.pages, DType::kBF16, {p.num_heads, p.num_kv_heads, p.head_dim}};
}

int Report(const absl::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace

extern "C" {

// Null when the device has no memory left.
void* HeadstartCreate(int num_sms) {
  auto* context = new Context(num_sms);
  auto memory = headstart::cuda::AllocateDevice(sizeof(uint32_t));
  if (!memory.ok() || cudaMemset(memory->get(), 0, sizeof(uint32_t)) != cudaSuccess) {
    delete context;
    return nullptr;
  }
  context->tile_counter = *std::move(memory);
  return context;
}

int HeadstartSelect(Context* context, const Problem* p, cudaStream_t stream) {
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = p->num_proxies;
  options.stride = p->stride;
  options.budget = p->shared_budget != 0 ? BudgetRule::kShared : BudgetRule::kOwn;
  options.gamma = p->gamma;
  options.forced_density = p->forced_density;
  options.dense_tail_blocks = p->dense_tail_blocks;
  options.dense_above_density = 1.0f;
  headstart::SequenceAttention sequence;
  sequence.q = {p->q, DType::kBF16, p->rows, int64_t{p->num_heads} * p->head_dim, p->q_stride};
  sequence.kv = PagesOf(*p);
  sequence.page_table = p->page_table;
  sequence.first_position = p->first_position;
  sequence.proxy_attn = &options;
  sequence.ends_prompt = true;
  sequence.budget_ratio = p->budget_ratio;
  return Report(context->selector.Select(
      sequence, nullptr, static_cast<uint32_t*>(context->tile_counter.get()), stream));
}

int HeadstartAttention(Context* context, const Problem* p, cudaStream_t stream) {
  headstart::cuda::AttentionParams params{};
  params.q = p->q;
  params.out = p->out;
  params.rows = p->rows;
  params.q_stride = p->q_stride;
  params.out_stride = int64_t{p->num_heads} * p->head_dim;
  params.kv = PagesOf(*p);
  headstart::cuda::AttendedSequence sequence;
  sequence.rows = {0, p->rows, p->first_position, p->page_table};
  if (p->selected != 0) sequence.kept = context->selector.kept();
  params.sequences = &sequence;
  params.num_sequences = 1;
  params.tile_counter = static_cast<uint32_t*>(context->tile_counter.get());
  params.num_sms = context->num_sms;
  return Report(
      headstart::cuda::ToStatus(headstart::cuda::LaunchAttention(params, stream), "attention"));
}

// The device lists of the last selection, see KeptBlocks.
const void* HeadstartLists(const Context* context) { return context->selector.kept().lists; }
const void* HeadstartCounts(const Context* context) { return context->selector.kept().counts; }
int64_t HeadstartListStride(const Context* context) { return context->selector.kept().head_stride; }

}  // extern "C"
