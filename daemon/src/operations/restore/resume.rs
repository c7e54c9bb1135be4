//! Resumes frozen agents by a thaw. Agents that have to be started again are launched by the project's actor, one
//! [`crate::operations::run::launch`] each.

use std::sync::Arc;
use std::time::Duration;

use fermata_protocol::pause::{AgentResumed, ResumeMethod};
use fermata_protocol::{AgentName, RunId};

use crate::operations::run::launch;
use crate::operations::{StepContext, side_by_side};
use crate::shims::link::{LinkError, ShimLink, read_run};
use crate::shims::reconnect;
use fermata_protocol::error_chain;

/// How often a thaw is tried: the link may be broken, or the shim may wait for a slow disk.
const TRIES: u32 = 4;

/// The delay after the first try; after the n-th it is n times as long.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How long a new connection to a shim whose link is broken may take.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Thaws these runs and returns the result for each. A run that cannot be thawed is ended.
pub async fn thaw(step: &StepContext, runs: &[(AgentName, RunId)]) -> Vec<AgentResumed> {
    let each = runs.iter().map(|(agent, run)| {
        let (step, agent, run) = (step.clone(), agent.clone(), run.clone());
        async move {
            match thaw_one(&step, &agent, &run).await {
                Ok(()) => AgentResumed { agent, method: ResumeMethod::Thawed, argv: None, detail: None },
                Err(error) => {
                    let run_dir = step.dirs().run(&agent, &run);
                    // Its tree must neither stay frozen nor run on later without supervision.
                    let end_failure = launch::end_run(&step, &run_dir).await.err();
                    let end_failure = end_failure.map(|failure| format!("; {failure}")).unwrap_or_default();
                    AgentResumed {
                        agent,
                        method: ResumeMethod::Failed,
                        argv: None,
                        detail: Some(format!("{error}{end_failure}")),
                    }
                }
            }
        }
    });
    side_by_side(each.collect::<Vec<_>>()).await
}

async fn thaw_one(step: &StepContext, agent: &AgentName, run: &RunId) -> Result<(), String> {
    let mut link = step.links.get(agent).filter(|link| link.run == *run).map(|link| Arc::clone(&link.shim));
    let mut last_error = "its processes have ended".to_owned();
    for attempt in 1..=TRIES {
        if link.as_ref().is_none_or(|link| link.is_closed()) {
            link = reconnect(step, agent, run).await.map(Arc::new);
        }
        let Some(shim) = &link else { break };
        match shim.thaw().await {
            Ok(()) => return Ok(()),
            Err(error @ LinkError::Refused { .. }) => return Err(error_chain(&error)),
            Err(error) => last_error = error_chain(&error),
        }
        tokio::time::sleep(RETRY_DELAY * attempt).await;
    }
    Err(last_error)
}

/// Connects to a shim whose link is broken, for this thaw only.
async fn reconnect(step: &StepContext, agent: &AgentName, run: &RunId) -> Option<ShimLink> {
    let record = read_run(&step.dirs().run(agent, run)).ok().flatten()?;
    reconnect::connect(&record, RECONNECT_TIMEOUT, &step.services.tracker).await.ok().map(|(link, _events)| link)
}
