//! The files that one connection exports and sends.

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::Sha256;

use crate::operations::checkpoint::transfer::BundleFile;

/// The files of one connection.
#[derive(Default)]
pub(super) struct Transfers {
    pub exported: Mutex<Option<BundleFile>>,
    pub sent: Mutex<Option<Sent>>,
}

/// A file that a client sends.
pub(super) struct Sent {
    pub file: File,
    pub bytes: u64,
    pub hash: Sha256,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
