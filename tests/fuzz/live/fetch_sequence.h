// A client of detached KV that does with its ids, parts and acknowledgements what it likes.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "headstart/v1/prefill.grpc.pb.h"
#include "tests/fuzz/live/hostile_message.h"

namespace headstart::testing {

class FetchSequence {
 public:
  FetchSequence(uint64_t seed, v1::PrefillService::Stub* stub) : random_(seed), stub_(*stub) {}
  // Ends what is left.
  ~FetchSequence();

  // A prompt, then fetches, acknowledgements, renewals, releases in any order. What the server
  // answers must be one of the codes that its contract names.
  void Run();

 private:
  struct Fetch {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriter<v1::FetchKvRequest, v1::PrefillResponse>> stream;
    uint32_t chunks = 0;
  };

  // No call outlasts this; nothing here waits for its end.
  static void SetDeadline(grpc::ClientContext& context);
  // False when it is refused.
  bool BeginPrompt();
  v1::PrefillRequest DrawPrompt();
  // The prompt's id, or with `guessed` one that was never given out.
  std::string AnyId(bool* guessed);
  v1::KvPart AnyPart();
  void Open();
  void ReadSome();
  void Acknowledge();
  void FetchAgainOnTheSameCall();
  void Renew();
  void Release();
  void EndOne();
  void ExpectContract(const char* call, const grpc::Status& status, bool guessed = false);

  Random random_;
  v1::PrefillService::Stub& stub_;
  grpc::ClientContext prefill_context_;
  std::unique_ptr<grpc::ClientReader<v1::PrefillResponse>> prefill_;
  std::string fetch_id_;
  std::vector<std::unique_ptr<Fetch>> fetches_;
};

}  // namespace headstart::testing
