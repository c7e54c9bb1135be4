//! Freezes process trees under a lease, renews the lease, commits the freeze, thaws.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fermata_protocol::pause::FreezerKind;
use fermata_protocol::{AgentName, Code, Refusal, RunId};
use tokio::task::JoinHandle;

use crate::errors::Failure;
use crate::operations::{StepContext, failpoint, side_by_side};
use crate::shims::link::{LinkError, read_exit, read_run};
use fermata_os::process;
use fermata_protocol::error_chain;
use fermata_shim::record;
use fermata_shim::wire::RefusalCode;

/// The result of freezing a project's agents.
#[derive(Debug, Clone)]
pub struct FrozenAgents {
    /// Sorted, without those that ended meanwhile.
    pub agents: Vec<AgentName>,
    /// `signals` when at least one agent is frozen by signals.
    pub mechanism: FreezerKind,
    pub processes: u64,
    /// When the first freeze began.
    pub since: Instant,
}

/// Freezes every run under the configured lease.
///
/// # Errors
/// When a run cannot be frozen; the others may be frozen then, and the undo thaws them.
pub async fn run(step: &StepContext, runs: &[(AgentName, RunId)]) -> Result<FrozenAgents, Failure> {
    failpoint("pause.freeze")?;
    let since = Instant::now();
    let lease = Duration::from_millis(step.services.settings().pause.lease_ms);
    let each = step.links_of(runs).map(|(agent, link)| {
        let (agent, link) = (agent.clone(), link.clone());
        async move {
            let frozen = link.shim.freeze(lease).await;
            (agent, frozen)
        }
    });
    let mut frozen = FrozenAgents { agents: Vec::new(), mechanism: FreezerKind::Cgroup, processes: 0, since };
    let mut failed = None;
    for (agent, result) in side_by_side(each.collect::<Vec<_>>()).await {
        match result {
            Ok(tree) => {
                frozen.processes += tree.processes;
                if tree.mechanism == FreezerKind::Signals {
                    frozen.mechanism = FreezerKind::Signals;
                }
                frozen.agents.push(agent);
            }
            Err(LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            Err(LinkError::Closed) if has_ended(step, &agent, runs) => {}
            Err(error) => failed = Some((agent, error_chain(&error))),
        }
    }
    // A run without a link may be alive, for instance while the daemon reconnects to its shim.
    let unlinked = |(agent, run): &&(AgentName, RunId)| step.links.get(agent).is_none_or(|link| link.run != *run);
    if let Some((agent, _)) = runs.iter().filter(unlinked).find(|(agent, _)| !has_ended(step, agent, runs)) {
        failed = Some((agent.clone(), "its shim cannot be reached".to_owned()));
    }
    if let Some((agent, error)) = failed {
        let message = format!("agent '{agent}' could not be frozen: {error}");
        return Err(Refusal::new(Code::PauseFailed, message).hint("try again, or stop the agent").into());
    }
    frozen.agents.sort();
    failpoint("pause.frozen")?;
    Ok(frozen)
}

/// Returns whether a run whose link is closed has ended: its exit is recorded, or its shim is dead. A link may break
/// while the agent runs on; such an agent must not count as frozen.
fn has_ended(step: &StepContext, agent: &AgentName, runs: &[(AgentName, RunId)]) -> bool {
    let Some((_, run)) = runs.iter().find(|(name, _)| name == agent) else { return true };
    let run_dir = step.dirs().run(agent, run);
    if read_exit(&run_dir).is_ok_and(|exit| exit.is_some()) {
        return true;
    }
    let alive = |record: record::RunRecord| process::is_alive(record.shim).unwrap_or(true);
    !read_run(&run_dir).ok().flatten().is_some_and(alive)
}

/// Renews the lease of every run once, which proves that no process of the runs has run since the freeze. Returns until
/// when they stay frozen, on the monotonic clock that the shims use too; `None` when no run is alive.
///
/// # Errors
/// When a tree is no longer frozen, or another process has thawed it meanwhile.
pub async fn renew(step: &StepContext, runs: &[(AgentName, RunId)]) -> Result<Option<Instant>, Failure> {
    let asked = Instant::now();
    let mut proven = None;
    let lease = Duration::from_millis(step.services.settings().pause.lease_ms);
    let each = step.links_of(runs).map(|(agent, link)| {
        let (agent, link) = (agent.clone(), link.clone());
        async move { (agent, link.shim.renew(lease).await) }
    });
    for (agent, result) in side_by_side(each.collect::<Vec<_>>()).await {
        match result {
            Ok(()) => proven = Some(asked + lease),
            Err(LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            Err(LinkError::Closed) if has_ended(step, &agent, runs) => {}
            Err(error) => {
                let message = format!("agent '{agent}' did not stay frozen: {}", error_chain(&error));
                return Err(Refusal::new(Code::PauseFailed, message).into());
            }
        }
    }
    Ok(proven)
}

/// Renews the leases of frozen runs until it is dropped. Cancels the operation when a renewal fails.
pub struct Renewer {
    task: JoinHandle<()>,
    lost: Arc<OnceLock<Failure>>,
}

impl Renewer {
    /// Renews at a third of the lease, in a tracked task.
    pub fn start(step: &StepContext, runs: Vec<(AgentName, RunId)>) -> Self {
        let tasks = step.services.tracker.clone();
        let step = step.clone();
        let pace = Duration::from_millis(step.services.settings().pause.lease_ms / 3).max(Duration::from_millis(50));
        let lost = Arc::new(OnceLock::new());
        let reason = Arc::clone(&lost);
        let task = tasks.spawn(async move {
            loop {
                tokio::time::sleep(pace).await;
                if let Err(failure) = renew(&step, &runs).await {
                    // The step under the freeze renews once more before it reports, and fails there.
                    tracing::warn!(project = %step.project.name, %failure, "a freeze has ended early");
                    reason.get_or_init(|| failure);
                    step.cancel.cancel();
                    return;
                }
            }
        });
        Self { task, lost }
    }

    /// Returns why work under the freeze failed: the failed renewal if there was one, else `failure`. Work that a failed
    /// renewal has cancelled itself reports only the cancellation.
    pub fn cause(&self, failure: Failure) -> Failure {
        self.lost.get().cloned().unwrap_or(failure)
    }
}

impl Drop for Renewer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Makes the freeze of these runs permanent. A freeze whose lease has expired is made again: the pause is committed, and
/// a paused project stays paused. Returns the runs whose lease had expired.
pub async fn commit(step: &StepContext, runs: &[(AgentName, RunId)]) -> Vec<(AgentName, RunId)> {
    let lease = Duration::from_millis(step.services.settings().pause.lease_ms);
    let each = step.links_of(runs).map(|(agent, link)| {
        let (agent, link, project) = (agent.clone(), link.clone(), step.project.name.clone());
        async move {
            let refusal = match link.shim.commit_freeze().await {
                Ok(()) => return None,
                Err(error) => error,
            };
            let refreeze = async {
                link.shim.freeze(lease).await?;
                link.shim.commit_freeze().await
            };
            match refreeze.await {
                Ok(()) => {
                    tracing::warn!(%project, %agent, "the agent ran for a moment in a paused project; frozen again")
                }
                Err(LinkError::Closed | LinkError::Refused { code: RefusalCode::Ending, .. }) => return None,
                Err(error) => {
                    tracing::error!(%project, %agent, error = error_chain(&error), "the agent cannot be kept frozen");
                    return None;
                }
            }
            // The shim itself reports a freeze that another process has broken.
            matches!(refusal, LinkError::Refused { code: RefusalCode::NotFrozen, .. }).then_some((agent, link.run))
        }
    });
    side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten().collect()
}

/// Thaws these runs.
///
/// # Errors
/// When a run may still be frozen.
pub async fn thaw(step: &StepContext, runs: &[(AgentName, RunId)]) -> Result<(), Failure> {
    let each = step.links_of(runs).map(|(agent, link)| {
        let (agent, link) = (agent.clone(), link.clone());
        async move { (agent, link.shim.thaw().await) }
    });
    let mut failed = None;
    for (agent, result) in side_by_side(each.collect::<Vec<_>>()).await {
        match result {
            Ok(()) | Err(LinkError::Closed | LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            Err(error) => failed = Some(Failure::fault(&format!("thaw agent '{agent}'"), &error)),
        }
    }
    failed.map_or(Ok(()), Err)
}
