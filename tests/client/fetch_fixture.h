// Detached KV on several connections, against a made-up server that is right but for what a test
// changes.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "client/prefill_client.h"
#include "tests/client/fake_server.h"
#include "tests/client/kv_stream.h"

namespace headstart::testing {

class FetchTest : public ::testing::Test {
 protected:
  FetchTest() {
    options_.timeout = absl::Seconds(20);
    options_.retry.initial_backoff = absl::Milliseconds(1);
    options_.connections = 2;
    receive_.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
      received_.assign(shape.total_bytes(), std::byte{0});
      return ContiguousKv(shape, absl::MakeSpan(received_));
    };
  }

  // A server that is right, but for what `fetch` does.
  void Serve(FakeServer::FetchHandler fetch) {
    server_ = std::make_unique<FakeServer>(
        [this](int, grpc::ServerContext&, PrefillWriter& writer) {
          WriteStream(server_->last_request().has_detached() ? detached_ : MakeStream(spec_, kv_),
                      writer);
          return prefill_status_;
        },
        std::move(fetch));
    options_.target = server_->target();
  }
  void Serve() {
    Serve([this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
      return SendAll(fetch, stream);
    });
  }

  KvStream StreamFor(const v1::KvFetch& fetch) const {
    return MakeFetchStream(spec_, kv_, fetch.part());
  }
  grpc::Status SendAll(const v1::KvFetch& fetch, FetchReaderWriter& stream) const {
    WriteFetch(StreamFor(fetch), fetch, stream);
    ReadAcks(stream);
    return grpc::Status::OK;
  }
  // A server whose stream of stripe 1 is damaged.
  void ServeDamaged(const std::function<void(KvStream&)>& damage) {
    Serve([this, damage](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
      KvStream messages = StreamFor(fetch);
      if (fetch.part().stripe_index() == 1) damage(messages);
      WriteFetch(messages, fetch, stream);
      ReadAcks(stream);
      return grpc::Status::OK;
    });
  }

  // from_chunk of every call of FetchKv for a stripe.
  std::vector<uint32_t> FetchedFrom(uint32_t stripe) const {
    std::vector<uint32_t> from;
    for (const v1::KvFetch& fetch : server_->fetches()) {
      if (fetch.part().stripe_index() == stripe) from.push_back(fetch.from_chunk());
    }
    return from;
  }

  absl::StatusOr<PrefillOutcome> Prefill(CancelToken* cancel = nullptr) {
    auto client = PrefillClient::Create(options_);
    if (!client.ok()) return client.status();
    return (*client)->Prefill(request_, receive_, cancel);
  }

  const KvStreamSpec spec_{.num_tokens = 61};  // 24 chunks
  const v1::PrefillRequest request_ = RequestFor(spec_);
  const std::vector<std::byte> kv_ = MakeKv(spec_);
  KvStream detached_ = MakeDetachedStream(spec_);
  grpc::Status prefill_status_;
  PrefillClientOptions options_;
  KvReceiverOptions receive_;
  std::vector<std::byte> received_;
  std::unique_ptr<FakeServer> server_;
};

}  // namespace headstart::testing
