#include "server/ops/recent_prompts.h"

#include <algorithm>
#include <utility>

namespace headstart {
namespace {

RecentPrompt Describe(const CallRecord& record, const absl::Status& status) {
  RecentPrompt prompt;
  prompt.request_id = record.request_id;
  prompt.code = status.code();
  prompt.reason = ReasonOf(status);
  prompt.num_tokens = record.num_tokens;
  prompt.detached = record.detached;
  prompt.ended_at = record.ended_at;
  prompt.total = record.total();
  if (!status.ok()) return prompt;
  const PrefillResult& result = *record.sent.result;
  prompt.cached_tokens = result.cached_tokens;
  prompt.total = record.ended_at - result.accepted_at;
  prompt.shares = ShareTime(result, record.ended_at);
  prompt.density = DensityOf(result);
  prompt.layer_density = result.layer_density;
  prompt.layer_head_budget = result.layer_head_budget;
  return prompt;
}

}  // namespace

bool RecentPrompt::is_sparse() const {
  return std::any_of(layer_head_budget.begin(), layer_head_budget.end(),
                     [](float budget) { return budget > 0; });
}

void RecentPrompts::Add(const CallRecord& record, const absl::Status& status) {
  if (!record.accepted) return;
  auto prompt = std::make_shared<RecentPrompt>(Describe(record, status));
  MutexLock lock(&mutex_);
  prompt->number = ++count_;
  prompts_.push_back(std::move(prompt));
  if (prompts_.size() > kCapacity) prompts_.pop_front();
}

std::vector<std::shared_ptr<const RecentPrompt>> RecentPrompts::Get() const {
  MutexLock lock(&mutex_);
  return {prompts_.begin(), prompts_.end()};
}

}  // namespace headstart
