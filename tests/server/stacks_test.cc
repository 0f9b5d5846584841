// Where threads are, from outside of them.
#include "server/ops/stacks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "tests/testing/notification.h"

namespace headstart {

// Outside of the anonymous namespace: its name is looked for.
__attribute__((noinline)) void StandsHereForAWhile(testing::Notification* reached,
                                                   testing::Notification* go_on) {
  reached->Notify();
  go_on->WaitForNotification();
  asm volatile("");  // no tail call
}

namespace {

using ::testing::HasSubstr;

TEST(StacksTest, NameTheFunctionsInWhichThreadsAre) {
  testing::Notification reached, go_on;
  std::thread thread([&] { StandsHereForAWhile(&reached, &go_on); });
  reached.WaitForNotification();
  const std::string stacks = AllStacks(absl::Seconds(10));
  go_on.Notify();
  thread.join();
  EXPECT_THAT(stacks, HasSubstr("StandsHereForAWhile"));
  EXPECT_THAT(stacks, HasSubstr("AllStacks"));  // its own
}

TEST(StacksTest, AThreadThatDoesNotAnswerHoldsNobodyUp) {
  testing::Notification reached, go_on;
  std::thread thread([&] {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    StandsHereForAWhile(&reached, &go_on);
  });
  reached.WaitForNotification();
  const std::string stacks = AllStacks(absl::Milliseconds(100));
  EXPECT_THAT(stacks, HasSubstr("does not answer"));
  EXPECT_THAT(AllStacks(absl::Milliseconds(100)), HasSubstr("AllStacks"));  // and again
  go_on.Notify();
  thread.join();
}

}  // namespace
}  // namespace headstart
