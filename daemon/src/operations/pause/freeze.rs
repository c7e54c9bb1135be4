//! Freezes trees under a lease, renews it, holds it, thaws.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fermata_protocol::pause::FreezerKind;
use fermata_protocol::{AgentName, Code, Refusal, RunId};
use tokio::task::JoinHandle;

use crate::errors::Failure;
use crate::operations::{StepContext, side_by_side};
use crate::shims::link::{LinkError, read_exit, read_run};
use fermata_os::process;
use fermata_protocol::error_chain;
use fermata_shim::record;
use fermata_shim::wire::RefusalCode;

/// What was frozen.
#[derive(Debug, Clone)]
pub struct Frozen {
    /// The agents, those that ended meanwhile left out.
    pub agents: Vec<AgentName>,
    /// `signals` when any agent had to be stopped so.
    pub mechanism: FreezerKind,
    /// How many processes stand still.
    pub processes: u64,
    /// When the first freeze began.
    pub since: Instant,
}

/// Freezes every run.
///
/// # Errors
/// When one of them cannot be frozen; the others may be frozen then, and the undo thaws them.
pub async fn run(site: &StepContext, runs: &[(AgentName, RunId)]) -> Result<Frozen, Failure> {
    crate::operations::failpoint("pause.freeze")?;
    let since = Instant::now();
    let lease = Duration::from_millis(site.services.settings().pause.lease_ms);
    let each = site.links_of(runs).map(|(agent, link)| {
        let (agent, link) = (agent.clone(), link.clone());
        async move {
            let frozen = link.shim.freeze(lease).await;
            (agent, frozen)
        }
    });
    let mut frozen = Frozen { agents: Vec::new(), mechanism: FreezerKind::Cgroup, processes: 0, since };
    let mut failed = None;
    for (agent, result) in side_by_side(each.collect::<Vec<_>>()).await {
        match result {
            Ok(one) => {
                frozen.processes += one.processes;
                if one.mechanism == FreezerKind::Signals {
                    frozen.mechanism = FreezerKind::Signals;
                }
                frozen.agents.push(agent);
            }
            Err(LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            Err(LinkError::Closed) if has_ended(site, &agent, runs) => {}
            Err(error) => failed = Some((agent, error_chain(&error))),
        }
    }
    // A run without a link may be alive all the same, for instance while its link is made anew.
    let unlinked = |(agent, run): &&(AgentName, RunId)| site.links.get(agent).is_none_or(|link| link.run != *run);
    if let Some((agent, _)) = runs.iter().filter(unlinked).find(|(agent, _)| !has_ended(site, agent, runs)) {
        failed = Some((agent.clone(), "its shim cannot be reached".to_owned()));
    }
    if let Some((agent, error)) = failed {
        let message = format!("agent '{agent}' could not be frozen: {error}");
        return Err(Refusal::new(Code::PauseFailed, message).hint("try again, or stop the agent").into());
    }
    frozen.agents.sort();
    crate::operations::failpoint("pause.frozen")?;
    Ok(frozen)
}

/// Says whether a run whose link is closed has ended: its exit is recorded, or its shim is gone.
/// A link may break while the agent runs on, and then nobody may say that it stands still.
fn has_ended(site: &StepContext, agent: &AgentName, runs: &[(AgentName, RunId)]) -> bool {
    let Some((_, run)) = runs.iter().find(|(name, _)| name == agent) else { return true };
    let run_dir = site.dirs().run(agent, run);
    if read_exit(&run_dir).is_ok_and(|exit| exit.is_some()) {
        return true;
    }
    let alive = |record: record::RunRecord| process::is_alive(record.shim).unwrap_or(true);
    !read_run(&run_dir).ok().flatten().is_some_and(alive)
}

/// Renews the lease of every run once: the proof that nobody has run since the freeze. Returns how
/// long nobody will, by the clock that the shims go by too; none when there is nobody.
///
/// # Errors
/// When a tree is no longer frozen, or somebody else has let it run.
pub async fn renew(site: &StepContext, runs: &[(AgentName, RunId)]) -> Result<Option<Instant>, Failure> {
    let asked = Instant::now();
    let mut proven = None;
    let lease = Duration::from_millis(site.services.settings().pause.lease_ms);
    let each = site.links_of(runs).map(|(agent, link)| {
        let (agent, link) = (agent.clone(), link.clone());
        async move { (agent, link.shim.renew(lease).await) }
    });
    for (agent, result) in side_by_side(each.collect::<Vec<_>>()).await {
        match result {
            Ok(()) => proven = Some(asked + lease),
            Err(LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            Err(LinkError::Closed) if has_ended(site, &agent, runs) => {}
            Err(error) => {
                let message = format!("agent '{agent}' did not stay frozen: {}", error_chain(&error));
                return Err(Refusal::new(Code::PauseFailed, message).into());
            }
        }
    }
    Ok(proven)
}

/// Renews leases for as long as it lives.
pub struct Renewer {
    task: JoinHandle<()>,
    lost: Arc<OnceLock<Failure>>,
}

impl Renewer {
    /// Begins to renew.
    pub fn start(site: &StepContext, runs: Vec<(AgentName, RunId)>) -> Self {
        let site = site.clone();
        let pace = Duration::from_millis(site.services.settings().pause.lease_ms / 3).max(Duration::from_millis(50));
        let lost = Arc::new(OnceLock::new());
        let tell = Arc::clone(&lost);
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(pace).await;
                if let Err(failure) = renew(&site, &runs).await {
                    // The step that works meanwhile renews once more before it reports, and fails there.
                    tracing::warn!(project = %site.project.name, %failure, "a freeze has ended early");
                    tell.get_or_init(|| failure);
                    site.cancel.cancel();
                    return;
                }
            }
        });
        Self { task, lost }
    }

    /// Returns why what works under the freeze failed: because the freeze ended, or of itself. Work
    /// that this has cut short says only that it was cancelled.
    pub fn cause(&self, failure: Failure) -> Failure {
        self.lost.get().cloned().unwrap_or(failure)
    }
}

impl Drop for Renewer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Makes the freeze of these runs permanent. One that has ended in the meantime is frozen again:
/// the pause is committed, and paused stays paused. Returns those whose lease was over.
pub async fn commit(site: &StepContext, runs: &[(AgentName, RunId)]) -> Vec<(AgentName, RunId)> {
    let lease = Duration::from_millis(site.services.settings().pause.lease_ms);
    let each = site.links_of(runs).map(|(agent, link)| {
        let (agent, link, project) = (agent.clone(), link.clone(), site.project.name.clone());
        async move {
            let refused = match link.shim.commit_freeze().await {
                Ok(()) => return None,
                Err(error) => error,
            };
            let again = async {
                link.shim.freeze(lease).await?;
                link.shim.commit_freeze().await
            };
            match again.await {
                Ok(()) => tracing::warn!(%project, %agent, "ran for a moment in a paused project; frozen again"),
                Err(LinkError::Closed | LinkError::Refused { code: RefusalCode::Ending, .. }) => return None,
                Err(error) => {
                    tracing::error!(%project, %agent, error = error_chain(&error), "cannot be held");
                    return None;
                }
            }
            // Of a freeze that somebody else has broken the shim tells by itself.
            matches!(refused, LinkError::Refused { code: RefusalCode::NotFrozen, .. }).then_some((agent, link.run))
        }
    });
    side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten().collect()
}

/// Lets these runs go on.
///
/// # Errors
/// When one of them may still be frozen.
pub async fn thaw(site: &StepContext, runs: &[(AgentName, RunId)]) -> Result<(), Failure> {
    let each = site.links_of(runs).map(|(agent, link)| {
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
