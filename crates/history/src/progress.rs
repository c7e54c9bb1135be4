//! Progress of a long operation, as it is reported to the caller.

/// The phase of a long operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorePhase {
    /// Scanning the workspace.
    Scan,
    /// Reading new and changed files.
    Read,
    /// Building the trees.
    Trees,
    /// Completing the pack.
    Pack,
    /// Checking objects.
    Verify,
    /// Changing the workspace.
    Apply,
    /// Comparing the restored workspace with the plan.
    Recheck,
}

/// How far a long operation has come.
#[derive(Clone, Copy, Debug)]
pub struct StoreProgress {
    pub phase: StorePhase,
    /// Completed units of the phase: files, objects or steps.
    pub done: u64,
    /// All units of the phase; 0 if the number is unknown.
    pub total: u64,
}

/// The callback for progress; it is called from several threads.
pub type OnProgress<'a> = &'a (dyn Fn(StoreProgress) + Sync);
