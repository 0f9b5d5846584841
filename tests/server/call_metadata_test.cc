#include "server/rpc/call_metadata.h"

#include <gtest/gtest.h>

#include <string>

namespace headstart {
namespace {

const char kTrace[] = "4bf92f3577b34da6a3ce929d0e0e4736";

TEST(TraceParentTest, FindsTheTraceId) {
  EXPECT_EQ(ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), kTrace);
}

TEST(TraceParentTest, IgnoresWhatIsNotValid) {
  for (const char* text : {
           "", "4bf92f3577b34da6a3ce929d0e0e4736",
           "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",    // another version
           "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",    // upper case
           "00-00000000000000000000000000000000-00f067aa0ba902b7-01",    // no trace
           "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",    // no parent
           "00-4bf92f3577b34da6a3ce929d0e0e473x-00f067aa0ba902b7-01",    // no digit
           "00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",    // no dash
           "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",  // too long
       }) {
    EXPECT_EQ(ParseTraceParent(text), "") << text;
  }
}

}  // namespace
}  // namespace headstart
