#include "tests/fuzz/live/fetch_sequence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <utility>

#include "tests/server/fetching.h"

namespace headstart::testing {

void FetchSequence::SetDeadline(grpc::ClientContext& context) {
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
}

FetchSequence::~FetchSequence() {
  while (!fetches_.empty()) EndOne();
  if (prefill_ == nullptr) return;
  if (random_.Percent(50)) prefill_context_.TryCancel();
  v1::PrefillResponse response;
  while (prefill_->Read(&response)) {
  }
  ExpectContract("Prefill", prefill_->Finish());
}

void FetchSequence::Run() {
  if (!BeginPrompt()) return;
  for (int64_t steps = random_.Between(1, 12); steps > 0; --steps) {
    const int64_t kind = random_.Between(1, 100);
    if (kind <= 30 || fetches_.empty()) {
      Open();
    } else if (kind <= 55) {
      ReadSome();
    } else if (kind <= 75) {
      Acknowledge();
    } else if (kind <= 80) {
      FetchAgainOnTheSameCall();
    } else if (kind <= 87) {
      Renew();
    } else if (kind <= 93) {
      Release();
    } else {
      EndOne();
    }
  }
  if (random_.Percent(50)) Release();
  if (random_.Percent(20)) Release();
}

v1::PrefillRequest FetchSequence::DrawPrompt() {
  const auto stripes = static_cast<uint32_t>(random_.Between(1, 4));
  v1::PrefillRequest request = DetachedPrompt(
      random_.Between(1, 700), random_.Percent(60) ? Stripes(stripes) : std::vector<v1::KvPart>{});
  if (random_.Percent(20)) SpoilFields(random_, 30, request.mutable_detached());
  if (random_.Percent(20)) request.set_skip_tokens(random_.Between(0, 800));
  if (random_.Percent(20)) request.set_kv_dtype(v1::KV_DTYPE_FP8_E4M3);
  if (random_.Percent(10)) request.set_request_id("the-same");
  return request;
}

bool FetchSequence::BeginPrompt() {
  SetDeadline(prefill_context_);
  prefill_ = stub_.Prefill(&prefill_context_, DrawPrompt());
  v1::PrefillResponse response;
  if (!prefill_->Read(&response) || !response.has_accepted()) return false;
  fetch_id_ = response.accepted().fetch_id();
  EXPECT_EQ(fetch_id_.size(), 16);
  return true;
}

std::string FetchSequence::AnyId(bool* guessed) {
  *guessed = random_.Percent(20);
  if (!*guessed) return fetch_id_;
  std::string id = fetch_id_;
  const int64_t kind = random_.Between(0, 3);
  if (kind == 0) id[random_.Between(0, 15)] ^= 1;
  if (kind == 1) id.resize(random_.Between(0, 15));
  if (kind == 2) id.append(static_cast<size_t>(random_.Between(1, 5000)), 'x');
  if (kind == 3) id.assign(16, '\0');
  return id;
}

v1::KvPart FetchSequence::AnyPart() {
  const auto count = static_cast<uint32_t>(random_.Between(1, 4));
  v1::KvPart part = Stripe(random_.Between(0, count - 1), count);
  if (random_.Percent(20)) SpoilFields(random_, 40, &part);
  return part;
}

void FetchSequence::Open() {
  auto fetch = std::make_unique<Fetch>();
  SetDeadline(fetch->context);
  fetch->stream = stub_.FetchKv(&fetch->context);
  bool guessed = false;
  v1::FetchKvRequest request;
  request.mutable_fetch()->set_fetch_id(AnyId(&guessed));
  *request.mutable_fetch()->mutable_part() = AnyPart();
  if (random_.Percent(20)) fetch->chunks = static_cast<uint32_t>(random_.Between(1, 1 << 20));
  if (random_.Percent(20)) fetch->chunks = 1;
  request.mutable_fetch()->set_from_chunk(fetch->chunks);
  fetch->stream->Write(request);
  fetches_.push_back(std::move(fetch));
  if (!guessed) return;
  v1::PrefillResponse response;
  EXPECT_FALSE(fetches_.back()->stream->Read(&response)) << "KV of an id that was never given out";
  ExpectContract("FetchKv", fetches_.back()->stream->Finish(), /*guessed=*/true);
  fetches_.pop_back();
}

void FetchSequence::ReadSome() {
  Fetch& fetch = *fetches_[random_.Between(0, std::ssize(fetches_) - 1)];
  v1::PrefillResponse response;
  for (int64_t left = random_.Between(1, 6); left > 0 && fetch.stream->Read(&response); --left) {
    if (!response.has_chunk()) continue;
    EXPECT_EQ(response.chunk().index(), fetch.chunks++);
  }
}

void FetchSequence::Acknowledge() {
  Fetch& fetch = *fetches_[random_.Between(0, std::ssize(fetches_) - 1)];
  v1::FetchKvRequest request;
  const auto wrong = static_cast<uint32_t>(random_.Between(0, 0xffffffff));
  request.mutable_ack()->set_num_chunks(random_.Percent(80) ? fetch.chunks : wrong);
  fetch.stream->Write(request);
}

void FetchSequence::FetchAgainOnTheSameCall() {
  v1::FetchKvRequest request;
  if (random_.Percent(70)) request.mutable_fetch()->set_fetch_id(fetch_id_);
  fetches_.back()->stream->Write(request);
}

void FetchSequence::Renew() {
  grpc::ClientContext context;
  SetDeadline(context);
  bool guessed = false;
  v1::RenewLeaseRequest request;
  request.set_fetch_id(AnyId(&guessed));
  v1::RenewLeaseResponse response;
  ExpectContract("RenewLease", stub_.RenewLease(&context, request, &response), guessed);
}

void FetchSequence::Release() {
  grpc::ClientContext context;
  SetDeadline(context);
  bool guessed = false;
  v1::ReleaseKvRequest request;
  request.set_fetch_id(AnyId(&guessed));
  v1::ReleaseKvResponse response;
  ExpectContract("ReleaseKv", stub_.ReleaseKv(&context, request, &response), guessed);
}

void FetchSequence::EndOne() {
  const auto which = fetches_.begin() + random_.Between(0, std::ssize(fetches_) - 1);
  Fetch& fetch = **which;
  if (random_.Percent(60)) fetch.context.TryCancel();
  v1::PrefillResponse response;
  while (fetch.stream->Read(&response)) {
  }
  ExpectContract("FetchKv", fetch.stream->Finish());
  fetches_.erase(which);
}

void FetchSequence::ExpectContract(const char* call, const grpc::Status& status, bool guessed) {
  static const std::set<grpc::StatusCode> allowed = {grpc::StatusCode::OK,
                                                     grpc::StatusCode::CANCELLED,
                                                     grpc::StatusCode::INVALID_ARGUMENT,
                                                     grpc::StatusCode::DEADLINE_EXCEEDED,
                                                     grpc::StatusCode::NOT_FOUND,
                                                     grpc::StatusCode::ALREADY_EXISTS,
                                                     grpc::StatusCode::RESOURCE_EXHAUSTED,
                                                     grpc::StatusCode::FAILED_PRECONDITION,
                                                     grpc::StatusCode::ABORTED,
                                                     grpc::StatusCode::OUT_OF_RANGE};
  EXPECT_TRUE(allowed.contains(status.error_code()))
      << call << ": " << status.error_code() << " " << status.error_message();
  EXPECT_FALSE(guessed && status.ok()) << call << " of an id that was never given out";
}

}  // namespace headstart::testing
