//! A real agent under Fermata: the Codex CLI against a model server on loopback that these tests
//! script themselves. No network, no account.
//!
//! The tests are ignored unless asked for, since they need the CLI: `make test-agents` installs it
//! and runs them with its path in `FERMATA_TEST_CODEX`.

mod bare;
mod codex;
mod http;
mod model_server;
mod pause_and_resume;
