# cmake -DOUT=version.cc -DSOURCE_DIR=… -DPROJECT_VERSION=… [-DGIVEN=…] -P version.cmake: writes OUT when the version changed.
# GIVEN, where there is no git (image, archive); else what git says of SOURCE_DIR; else the project's version.
set(version "${GIVEN}")
if(NOT version)
  set(version "${PROJECT_VERSION}")
  find_program(GIT git)
  if(GIT AND EXISTS "${SOURCE_DIR}/.git")
    execute_process(COMMAND "${GIT}" -C "${SOURCE_DIR}" describe --tags --match "v[0-9]*" --always --dirty --abbrev=12
      OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(described MATCHES "^v([0-9].*)$")
      set(version "${CMAKE_MATCH_1}")
    elseif(described)
      set(version "${PROJECT_VERSION}-g${described}")
    endif()
  endif()
endif()
if(NOT version MATCHES "^[0-9A-Za-z][0-9A-Za-z._-]*$")
  message(FATAL_ERROR "version ${version}: letters, digits, '.', '_' and '-' only, as tags and labels have")
endif()
file(CONFIGURE OUTPUT "${OUT}" CONTENT [[// Made by version.cmake.
#include "server/version.h"

namespace headstart {

const char* const kVersion = "@version@";

}  // namespace headstart
]] @ONLY)
