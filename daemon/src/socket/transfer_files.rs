//! The files that a client downloads and uploads on one connection.

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::Sha256;

use crate::operations::checkpoint::transfer::BundleFile;

/// The files of one connection.
#[derive(Default)]
pub(super) struct Transfers {
    pub exported: Mutex<Option<BundleFile>>,
    pub uploaded: Mutex<Option<UploadedFile>>,
}

/// A file that a client has uploaded, so far.
pub(super) struct UploadedFile {
    pub file: File,
    pub bytes: u64,
    pub hash: Sha256,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
