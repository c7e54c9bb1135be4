//! Progress of a long action of the store, as it is reported to the caller.

/// The part of a long action that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Listing the workspace.
    Scan,
    /// Reading files that are not known.
    Read,
    /// Building trees.
    Trees,
    /// Completing the pack.
    Pack,
    /// Checking objects.
    Verify,
    /// Changing the workspace.
    Apply,
    /// Comparing the workspace with what it should be.
    Recheck,
}

/// How far a long action has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// The part that is under way.
    pub phase: Phase,
    /// Steps done.
    pub done: u64,
    /// Steps in all; 0 when that is not known.
    pub total: u64,
}

/// Is told about progress, from several threads.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);
