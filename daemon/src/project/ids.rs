//! New ids and tokens. Besides the jitter of delays, only they are random.

use fermata_core::command::NewRun;
use fermata_protocol::{OperationId, RunId};
use sha2::{Digest as _, Sha256};

use crate::hashing::hex;
use fermata_os::clock;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        // A token made without the kernel's random numbers would not be a secret.
        panic!("failed to get random numbers from the kernel: {error}");
    }
    bytes
}

/// Makes an id that begins with the time, so that later ids sort after earlier ones.
fn id(prefix: &str) -> String {
    format!("{prefix}-{:011x}{}", clock::unix_ms(), hex(&random::<4>()))
}

pub fn new_operation() -> OperationId {
    OperationId::new(id("op")).unwrap_or_else(|e| unreachable!("a generated id is valid: {e}"))
}

/// Makes an id of this start of the daemon.
pub fn new_boot_epoch() -> String {
    id("epoch")
}

/// The token of a new run.
#[derive(Debug, Clone)]
pub struct NewToken {
    pub run: RunId,
    /// The secret itself; only its hash is persisted.
    pub token: String,
}

/// Makes the identity and the token of a new run.
pub fn new_run() -> (NewRun, NewToken) {
    let run = RunId::new(id("run")).unwrap_or_else(|e| unreachable!("a generated id is valid: {e}"));
    let token = hex(&random::<16>());
    let token_sha256 = hex(&Sha256::digest(token.as_bytes()));
    (NewRun { id: run.clone(), token_sha256 }, NewToken { run, token })
}
