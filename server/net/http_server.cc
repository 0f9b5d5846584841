#include "server/net/http_server.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <future>
#include <list>
#include <map>
#include <thread>

#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using StreamSocket = asio::generic::stream_protocol::socket;
using Clock = std::chrono::steady_clock;
using AnswerPtr = std::shared_ptr<const HttpAnswer>;

constexpr size_t kMaxHeadBytes = 8 << 10;
// For the client to close, after it has the answer or when the server ends. Closing at once would
// cost it the answer, if it has sent more than was read.
constexpr std::chrono::seconds kGoodbye{1};
constexpr size_t kMaxDroppedBytes = 64 << 10;

AnswerPtr Refusal(http::status status, const std::string& why,
                  std::vector<std::pair<std::string, std::string>> headers = {}) {
  return std::make_shared<HttpAnswer>(HttpAnswer{static_cast<int>(status), absl::StrCat(why, "\n"),
                                                 "text/plain; charset=utf-8", std::move(headers)});
}

// Why a head can't be taken. Null where nobody is left to be told.
AnswerPtr RefusalOf(const error_code& error) {
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    return Refusal(http::status::request_header_fields_too_large,
                   absl::StrCat("the request's head has more than ", kMaxHeadBytes, " bytes"));
  }
  if (error == http::error::body_limit) {
    return Refusal(http::status::payload_too_large, "requests have no body here");
  }
  const bool from_client = error.category() == error_code(http::error::bad_method).category() &&
                           error != http::error::end_of_stream &&
                           error != http::error::partial_message;
  return from_client ? Refusal(http::status::bad_request, error.message()) : nullptr;
}

// Makes answers on a thread of its own: one at a time, and one for all who asked before it was
// begun.
class AnswerMaker {
 public:
  explicit AnswerMaker(std::function<HttpAnswer()> make) : make_(std::move(make)) {}
  // Who waits in the queue gets no answer.
  ~AnswerMaker() {
    thread_.stop();
    thread_.join();
  }

  // `done` is called on that thread.
  void Ask(std::function<void(AnswerPtr)> done) {
    asio::post(thread_, [this, asked = Clock::now(), done = std::move(done)] {
      if (answer_ == nullptr || asked >= began_) {
        began_ = Clock::now();
        answer_ = std::make_shared<HttpAnswer>(make_());
      }
      done(answer_);
    });
  }

 private:
  const std::function<HttpAnswer()> make_;
  Clock::time_point began_;  // this and the next only on the thread
  AnswerPtr answer_;
  asio::thread_pool thread_{1};
};

}  // namespace

// Everything but AnswerMakers lives on one thread.
class HttpServer::State {
 public:
  using Sessions = std::list<std::shared_ptr<Session>>;

  State(std::vector<HttpRoute> routes, std::chrono::milliseconds request_time);
  ~State();

  void Add(int fd, bool local);
  void Forget(Sessions::iterator session) { sessions_.erase(session); }
  // The route of a request, or why there is none.
  const HttpRoute* Find(absl::string_view method, absl::string_view path, AnswerPtr* refusal) const;
  AnswerMaker* MakerOf(const HttpRoute& route) {
    const auto maker = makers_.find(&route);
    return maker == makers_.end() ? nullptr : &maker->second;
  }
  asio::io_context& context() { return context_; }
  std::chrono::milliseconds request_time() const { return request_time_; }

 private:
  void End();

  const std::vector<HttpRoute> routes_;
  const std::chrono::milliseconds request_time_;
  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  Sessions sessions_;  // oldest first
  std::map<const HttpRoute*, AnswerMaker> makers_;
  std::thread thread_;
};

// One connection: reads a head, answers, waits a moment for the client to close.
class HttpServer::Session : public std::enable_shared_from_this<Session> {
 public:
  Session(State* state, StreamSocket socket, bool local)
      : state_(*state), socket_(std::move(socket)), deadline_(state->context()), local_(local) {
    parser_.header_limit(kMaxHeadBytes);
    parser_.body_limit(0);
  }

  void Start(State::Sessions::iterator place);
  // Closes; nothing is called any more that does anything. Idempotent.
  void Close();
  // The server ends: what is not being answered is closed.
  void End();
  bool waits() const { return phase_ != Phase::kAnswering; }

 private:
  enum class Phase : uint8_t { kReading, kAnswering, kLeaving, kClosed };

  void SetDeadline(std::chrono::milliseconds time);
  void OnDeadline();
  void OnHead(const error_code& error);
  void Route();
  void Answer(const HttpAnswer& answer);
  void Leave();
  void Drop();

  State& state_;
  StreamSocket socket_;
  asio::steady_timer deadline_;
  const bool local_;
  State::Sessions::iterator place_;
  Phase phase_ = Phase::kReading;
  bool late_ = false;
  boost::beast::flat_buffer head_{2 * kMaxHeadBytes};
  http::request_parser<http::empty_body> parser_;
  http::response<http::string_body> response_;
  std::array<char, 4096> dropped_;
  size_t dropped_bytes_ = 0;
};

// ---- session

void HttpServer::Session::Start(State::Sessions::iterator place) {
  place_ = place;
  SetDeadline(state_.request_time());
  http::async_read_header(socket_, head_, parser_,
                          [self = shared_from_this()](const error_code& error, size_t) {
                            if (self->phase_ == Phase::kReading) self->OnHead(error);
                          });
}

void HttpServer::Session::Close() {
  if (phase_ == Phase::kClosed) return;
  phase_ = Phase::kClosed;
  error_code ignored;
  socket_.close(ignored);
  deadline_.cancel();
  state_.Forget(place_);  // the last reference may go: nothing after this
}

void HttpServer::Session::End() {
  if (waits()) return Close();
  SetDeadline(kGoodbye);
}

void HttpServer::Session::SetDeadline(std::chrono::milliseconds time) {
  deadline_.expires_after(time);
  deadline_.async_wait([self = shared_from_this()](const error_code& error) {
    if (!error) self->OnDeadline();
  });
}

void HttpServer::Session::OnDeadline() {
  if (phase_ != Phase::kReading) return Close();
  late_ = true;
  error_code ignored;
  socket_.cancel(ignored);  // OnHead is told
}

void HttpServer::Session::OnHead(const error_code& error) {
  if (!error) return Route();
  const AnswerPtr refusal =
      late_ ? Refusal(http::status::request_timeout, "the request did not come in time")
            : RefusalOf(error);
  if (refusal == nullptr) return Close();
  if (late_) SetDeadline(kGoodbye);
  Answer(*refusal);
}

void HttpServer::Session::Route() {
  const auto& request = parser_.get();
  if (parser_.chunked() || parser_.content_length().value_or(0) > 0) {
    return Answer(*Refusal(http::status::payload_too_large, "requests have no body here"));
  }
  const absl::string_view target(request.target().data(), request.target().size());
  AnswerPtr refusal;
  const HttpRoute* route =
      state_.Find(absl::string_view(request.method_string().data(), request.method_string().size()),
                  target.substr(0, target.find('?')), &refusal);
  if (route == nullptr) return Answer(*refusal);
  if (route->only_local && !local_) {
    return Answer(*Refusal(http::status::forbidden, "only through the Unix socket of this server"));
  }
  AnswerMaker* maker = state_.MakerOf(*route);
  if (maker == nullptr) return Answer(route->answer());
  phase_ = Phase::kAnswering;
  maker->Ask([self = shared_from_this()](AnswerPtr answer) {
    asio::post(self->state_.context(), [self, answer = std::move(answer)] {
      if (self->phase_ == Phase::kAnswering) self->Answer(*answer);
    });
  });
}

void HttpServer::Session::Answer(const HttpAnswer& answer) {
  phase_ = Phase::kAnswering;
  response_.version(11);
  response_.result(static_cast<unsigned>(answer.status));
  response_.keep_alive(false);
  response_.set(http::field::content_type, answer.type);
  for (const auto& [name, value] : answer.headers) response_.set(name, value);
  response_.body() = answer.body;
  response_.prepare_payload();
  if (parser_.get().method() == http::verb::head) response_.body().clear();
  http::async_write(socket_, response_,
                    [self = shared_from_this()](const error_code& error, size_t) {
                      if (self->phase_ != Phase::kAnswering) return;
                      error ? self->Close() : self->Leave();
                    });
}

void HttpServer::Session::Leave() {
  phase_ = Phase::kLeaving;
  error_code ignored;
  socket_.shutdown(StreamSocket::shutdown_send, ignored);
  SetDeadline(kGoodbye);
  Drop();
}

void HttpServer::Session::Drop() {
  socket_.async_read_some(
      asio::buffer(dropped_), [self = shared_from_this()](const error_code& error, size_t count) {
        if (self->phase_ != Phase::kLeaving) return;
        self->dropped_bytes_ += count;
        error || self->dropped_bytes_ > kMaxDroppedBytes ? self->Close() : self->Drop();
      });
}

// ---- state

HttpServer::State::State(std::vector<HttpRoute> routes, std::chrono::milliseconds request_time)
    : routes_(std::move(routes)), request_time_(request_time) {
  for (const HttpRoute& route : routes_) {
    if (route.slow) makers_.try_emplace(&route, route.answer);
  }
  thread_ = std::thread([this] { context_.run(); });
}

HttpServer::State::~State() {
  std::promise<void> ended;
  asio::post(context_, [this, &ended] {
    End();
    ended.set_value();
  });
  ended.get_future().wait();  // nobody asks a maker from now on
  makers_.clear();
  thread_.join();
}

void HttpServer::State::End() {
  work_.reset();
  for (const std::shared_ptr<Session>& session : Sessions(sessions_)) session->End();
}

void HttpServer::State::Add(int fd, bool local) {
  StreamSocket socket(context_);
  error_code error;
  socket.assign(asio::generic::stream_protocol(AF_UNSPEC, 0), fd, error);
  if (error || !work_.owns_work()) {
    if (!socket.is_open()) close(fd);
    return;
  }
  if (sessions_.size() >= kMaxConnections) {
    const auto idle = std::find_if(sessions_.begin(), sessions_.end(),
                                   [](const auto& session) { return session->waits(); });
    const std::shared_ptr<Session> oldest = idle == sessions_.end() ? sessions_.front() : *idle;
    oldest->Close();
  }
  const auto place =
      sessions_.insert(sessions_.end(), std::make_shared<Session>(this, std::move(socket), local));
  (*place)->Start(place);
}

const HttpRoute* HttpServer::State::Find(absl::string_view method, absl::string_view path,
                                         AnswerPtr* refusal) const {
  std::string allowed;
  for (const HttpRoute& route : routes_) {
    if (route.path != path) continue;
    if (method == route.method || (method == "HEAD" && route.method == "GET")) return &route;
    absl::StrAppend(&allowed, allowed.empty() ? "" : ", ",
                    route.method == "GET" ? "GET, HEAD" : route.method);
  }
  *refusal = allowed.empty() ? Refusal(http::status::not_found, "no such page")
                             : Refusal(http::status::method_not_allowed, "not with this method",
                                       {{"Allow", allowed}});
  return nullptr;
}

// ---- server

HttpServer::HttpServer(std::vector<HttpRoute> routes, std::chrono::milliseconds request_time)
    : state_(std::make_unique<State>(std::move(routes), request_time)) {}

HttpServer::~HttpServer() = default;

void HttpServer::Serve(int fd, bool local) {
  asio::post(state_->context(), [state = state_.get(), fd, local] { state->Add(fd, local); });
}

}  // namespace headstart
