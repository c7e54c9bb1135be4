//! Puts what agents use into the views that show them.

use fermata_core::Project;
use fermata_protocol::agent::AgentView;

use crate::project::subjects;
use crate::services::Services;

/// Fills the views of one or several projects' agents.
pub(super) async fn fill(services: &Services, projects: &[&Project], views: &mut [AgentView]) {
    let subjects = projects.iter().flat_map(|project| subjects(services, project)).collect();
    let samples = services.loads.sample(subjects).await;
    for view in views.iter_mut().filter(|view| view.pid.is_some()) {
        view.load = view.run.as_ref().and_then(|run| samples.get(run)).copied();
    }
}
